"""The ledger of a run: what its models cost, and who tells it what ran."""

from typing import Any

from tutelage.errors import ConfigError
from tutelage.methods.grading import MIXED, teachers_of
from tutelage.methods.teacher_settings import TeacherSettings
from tutelage.methods.workbench import Workbench
from tutelage.policies.load import resolve_model
from tutelage.train.costs import RunLedger
from tutelage.train.ledger import ModelCost, cost_of


def run_ledger(bench: Workbench) -> RunLedger | None:
    """None where a model's config does not name its sizes, so that its operations cannot be counted."""
    try:
        student = _student_cost(bench)
        authors: dict[str, ModelCost] = {}
        counted: list[tuple[Any, ModelCost]] = []
        for settings in bench.config.stages:
            for _, teacher in teachers_of(settings):
                if teacher.cache is not None:
                    continue
                is_own = teacher.name == "self" or teacher.is_own_average
                if not is_own:
                    authors[bench.author_of(teacher)] = _teacher_cost(bench, teacher)
                if getattr(settings, "divergence", None) is not None:
                    counted.append((bench.teacher(teacher), student if is_own else authors[bench.author_of(teacher)]))
            if getattr(settings, "teacher_mix", 0.0) > 0:
                authors[MIXED] = student + authors[bench.author_of(settings.teacher)]
    except ConfigError as error:
        bench.notes.append(f"operations are not counted: {error}")
        return None
    shares = bench.processes.count > 1
    ledger = RunLedger(student, authors=authors, sum_numbers=bench.processes.sum_numbers if shares else None)
    for who, cost in counted:
        who.on_scored = ledger.counter(cost)
    return ledger


def _teacher_cost(bench: Workbench, teacher: TeacherSettings) -> ModelCost:
    if teacher.url is None:
        return cost_of(bench.teacher_policy(teacher.name, teacher.precision, teacher.quantise).causal_model)
    from transformers import AutoConfig

    return cost_of(AutoConfig.from_pretrained(resolve_model(bench.beside(teacher.name))[0]))


def _student_cost(bench: Workbench) -> ModelCost:
    model = bench.policy.causal_model
    if bench.config.model.lora is None:
        return cost_of(model)
    total = sum(p.numel() for p in bench.policy.model.parameters())
    trained = sum(p.numel() for p in bench.policy.model.parameters() if p.requires_grad)
    return cost_of(model, trained_share=trained / total, head_trained=False)
