"""Stored conversations with tools: the task that is read back shows them, so a hint can be put into its prompt."""

from pathlib import Path

from tutelage.data.store import TrajectoryWriter
from tutelage.methods.settings import DataSettings
from tutelage.methods.stored import stored_groups
from tutelage.signals.routing import HintedPrompt, with_hint
from tutelage.testing.tiny import CHATML, tiny_tokenizer
from tutelage.text import ChatText
from tutelage.types import Trajectory

TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},)
TEMPLATE = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML


def test_the_tools_of_a_stored_conversation_are_in_its_task(tmp_path: Path) -> None:
    text = ChatText(tiny_tokenizer(), template=TEMPLATE)
    messages = (
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "add(2, 2)"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    )
    [spans] = text.render_conversation(messages, tools=TOOLS)
    own = Trajectory(
        id="t",
        task_id="q",
        task_hash="q",
        spans=tuple(spans),
        messages=messages,
        tokenizer=text.fingerprint,
        extra={"tools": list(TOOLS)},
    )
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(own)
    [group], _ = stored_groups(tmp_path / "s", DataSettings(path="x"), text, lambda *a: None)
    assert group.task.tools == TOOLS
    seen = HintedPrompt(text, with_hint("psst"))(group.task, group.trajectories[0])
    assert text.decode(seen.token_ids) == text.decode(own.token_ids).replace("2+2?", "2+2?\n\npsst")
