"""Chat messages to tokens: who wrote each token, and what a chat template does with a conversation."""

from tutelage.text.chat import TEMPLATE_DATE, ChatText, Continuation, train_flags
from tutelage.text.probe import TemplateReport
from tutelage.text.vocabulary import EosPad

__all__ = ["TEMPLATE_DATE", "ChatText", "Continuation", "EosPad", "TemplateReport", "train_flags"]
