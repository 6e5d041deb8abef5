"""Watching a run: entropy and novelty, probes, the regression gate, the graduation verdict, the gap diagnosis."""

from tutelage.monitors.criteria import Criterion, GraduationSettings
from tutelage.monitors.diagnosis import Diagnosis, DiagnosisSettings, PromptMeasures, cost_slope, diagnose
from tutelage.monitors.drift import mean_nll, nll_by_task, sampled_kl
from tutelage.monitors.entropy import EntropyStats, NoveltyHistory, entropy_stats
from tutelage.monitors.graduation import GraduationMonitor, graduation_rows
from tutelage.monitors.practised import Practised
from tutelage.monitors.probe import Probe, Prober, TaskProbe, run_probe
from tutelage.monitors.regression import RegressionGate, RegressionSettings
from tutelage.monitors.sampling import MakeTrajectory, PromptText

__all__ = [
    "Criterion",
    "Diagnosis",
    "DiagnosisSettings",
    "EntropyStats",
    "GraduationMonitor",
    "GraduationSettings",
    "MakeTrajectory",
    "NoveltyHistory",
    "Practised",
    "Probe",
    "Prober",
    "PromptMeasures",
    "PromptText",
    "RegressionGate",
    "RegressionSettings",
    "TaskProbe",
    "cost_slope",
    "diagnose",
    "entropy_stats",
    "graduation_rows",
    "mean_nll",
    "nll_by_task",
    "run_probe",
    "sampled_kl",
]
