"""What is learned: the second of a method's two slots."""

from tutelage.signals.distribution import TeacherDistribution
from tutelage.signals.estimators import check_pair
from tutelage.signals.hard import HardTargets
from tutelage.signals.minillm import MiniLLM
from tutelage.signals.policy_gradient import PolicyGradient
from tutelage.signals.pretraining import WithPretraining
from tutelage.signals.routing import HintedPrompt, with_hint, with_system
from tutelage.signals.sampled import SampledLogRatio

__all__ = [
    "HardTargets",
    "HintedPrompt",
    "MiniLLM",
    "PolicyGradient",
    "SampledLogRatio",
    "TeacherDistribution",
    "WithPretraining",
    "check_pair",
    "with_hint",
    "with_system",
]
