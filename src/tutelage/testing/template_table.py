"""What well-known chat templates do with a conversation, as a table: `python -m tutelage.testing.template_table`.

The templates are those that come with TRL, a development dependency. docs/chat-templates.md shows the table.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from tutelage.errors import MissingExtra
from tutelage.text import ChatText, TemplateReport

_SPECIAL = re.compile(r"<\|[^|<>\s{}'\"]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|\[/?INST\]")
_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance|sop|gMASK)>")
_ALWAYS_SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<end_of_utterance>")

HEADERS = (
    "template",
    "system",
    "tools",
    "tool calls",
    "tool results",
    "reasoning",
    "of earlier turns",
    "same after a user",
    "same after a tool",
    "stop token",
)


def template_folder() -> Path:
    """The folder of the templates that come with TRL.

    Raises:
        MissingExtra: TRL is not installed.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("the table needs the templates that come with TRL: pip install trl")
    return Path(next(iter(spec.submodule_search_locations))) / "chat_templates"


def byte_tokenizer(template: str) -> Any:
    """A byte-level tokenizer with the control tokens that a template writes: 256 bytes, and merges of blanks.

    The end-of-text tokens "<bos>" and "<eos>" are special. Reasoning and tool markers (<think>, <tool_call>) are added
    tokens that are not marked special, as in Qwen's vocabularies.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    markup = dict.fromkeys(_MARKUP.findall(template))
    special = [*dict.fromkeys(_SPECIAL.findall(template)), *(m for m in markup if m in _ALWAYS_SPECIAL)]
    special = [s for s in special if s not in ("<bos>", "<eos>")]
    backend.add_tokens([AddedToken(m, special=False, normalized=False) for m in markup if m not in special])
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<bos>", "<eos>", *special)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def report_of(template: str) -> TemplateReport:
    """What a template does, with a tokenizer that has its control tokens."""
    return ChatText(byte_tokenizer(template)).report


def row(name: str, report: TemplateReport) -> tuple[str, ...]:
    """One line of the table."""
    calls = {"dropped: name, argument key, argument value": "dropped"}.get(report.tool_calls, report.tool_calls)
    has_tools = calls == "kept" and report.tool_results == "kept"
    stops = [report.stop] if report.stop else [f"next: {s}" for s in report.stop_in_next.values()]
    if report.call_stop and report.call_stop not in stops:
        stops.append(f"{report.call_stop} (calls)")
    same_after_user = (
        "no" if not report.prefix_after_user else "yes" if report.prefix_after_user_with_reasoning else "not reasoning"
    )
    return (
        name,
        report.system if not report.default_system else f"{report.system}, has its own",
        report.tool_definitions,
        calls,
        report.tool_results,
        report.reasoning,
        report.earlier_reasoning if report.reasoning == "kept" else "",
        same_after_user,
        ("yes" if report.prefix_after_tool else "no") if has_tools else "",
        " ".join(f"`{s.replace('|', chr(92) + '|')}`" for s in stops),
    )


def table() -> str:
    """The table over every template of TRL that is not one of its patched training variants, in Markdown."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    for path in sorted(template_folder().glob("*.jinja")):
        if not path.stem.endswith("_training"):
            cells = row(path.stem, report_of(path.read_text(encoding="utf-8")))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
