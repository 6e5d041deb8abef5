"""Evaluation: unbiased pass@k with intervals and chance level, paired comparisons, retention and drift."""

from tutelage.evals.evaluate import chance_level, evaluate
from tutelage.evals.passk import PassAtK, TaskCounts, pass_at_k_by_family, pass_at_k_over
from tutelage.evals.result import Comparison, EvalResult, compare, compare_controls, comparison_rows
from tutelage.monitors.sampling import MakeTrajectory, PromptText

__all__ = [
    "Comparison",
    "EvalResult",
    "MakeTrajectory",
    "PassAtK",
    "PromptText",
    "TaskCounts",
    "chance_level",
    "compare",
    "compare_controls",
    "comparison_rows",
    "evaluate",
    "pass_at_k_by_family",
    "pass_at_k_over",
]
