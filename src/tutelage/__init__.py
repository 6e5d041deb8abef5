"""Post-train language models by imitation: SFT, distillation and rejection sampling."""

__version__ = "0.1.0"
