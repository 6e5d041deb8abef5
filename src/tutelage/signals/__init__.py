"""What is learned: the second of a method's two slots."""

from tutelage.signals.hard import HardTargets

__all__ = ["HardTargets"]
