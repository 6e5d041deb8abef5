"""What chat templates do: the table over TRL's templates, and each way of ending a turn."""

from pathlib import Path

import pytest

from tutelage.errors import MissingExtra, TemplateError
from tutelage.testing.template_table import HEADERS, byte_tokenizer, report_of, row, table, template_folder
from tutelage.text import ChatText

try:
    FOLDER = template_folder()
except MissingExtra:
    FOLDER = None
needs_trl = pytest.mark.skipif(FOLDER is None, reason="needs the templates that come with TRL (pip install trl)")
PAGE = Path(__file__).parents[2] / "docs" / "chat-templates.md"

CALL = {"id": "call0", "type": "function", "function": {"name": "add", "arguments": '{"a": "x y"}'}}
USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "Fine."}
THOUGHT = {"role": "assistant", "content": "Fine.", "reasoning_content": "Hm."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "call0", "name": "add"}
CHATS = {
    "one": [USER, ANSWER],
    "two": [USER, ANSWER, USER, ANSWER],
    "reasoning": [USER, THOUGHT, USER, THOUGHT],
    "tool": [USER, CALLING, RESULT, ANSWER],
}


def read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def trained(chat: ChatText, messages) -> list[list[str]]:
    samples = chat.render_conversation(messages, allow_lossy=True)
    return [[chat.decode(s.token_ids) for s in sample if s.is_trainable] for sample in samples]


@needs_trl
def test_the_table_in_the_docs_is_what_the_templates_do():
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- table -->\n")[2].partition("<!-- end of table -->")[0]
    assert shown == table(), "regenerate docs/chat-templates.md as it says at its end"


# Facts about the templates found out by reading and running them, independently of the probe.
FACTS = {
    "qwen2_5": {"tool calls": "kept", "reasoning": "dropped", "same after a user": "yes"},
    "qwen3": {"tool calls": "kept", "reasoning": "kept", "of earlier turns": "dropped", "same after a user": "no"},
    "llama3": {"tool calls": "dropped", "reasoning": "dropped", "stop token": "`<\\|eot_id\\|>`"},
    "llama3_1": {"tool calls": "kept", "reasoning": "dropped", "system": "kept, has its own"},
    "gptoss": {
        "of earlier turns": "dropped",
        "same after a user": "no",
        "stop token": "`<\\|return\\|>` `<\\|call\\|> (calls)`",
    },
    "glm4moe": {"of earlier turns": "dropped", "stop token": "`next: <\\|user\\|>` `next: <\\|observation\\|>`"},
    "gemma": {"system": "refused", "tool results": "refused", "stop token": "`<end_of_turn>`"},
    "gemma3": {"system": "kept", "tool results": "refused"},
    "deepseekv3": {"reasoning": "dropped", "tool calls": "kept"},
    "lfm2": {"tool calls": "dropped", "tools": "kept"},
    "phi3_5": {"tool calls": "dropped", "tool results": "dropped"},
    "nemotron_3_nano": {"of earlier turns": "dropped", "same after a user": "not reasoning"},
}


@needs_trl
@pytest.mark.parametrize("name", FACTS)
def test_known_facts_of_templates_are_found(name):
    cells = dict(zip(HEADERS, row(name, report_of(read(name))), strict=True))
    assert {k: cells[k] for k in FACTS[name]} == FACTS[name]


@needs_trl
def test_what_was_found_is_said_in_sentences():
    said = " ".join(report_of(read("qwen3")).sentences())
    assert "drops the reasoning of earlier turns" in said and "own sample" in said and "never trained" in said
    assert "next message's first token (<|user|> before a user" in " ".join(report_of(read("glm4moe")).sentences())
    assert "raises an error on system messages" in " ".join(report_of(read("gemma")).sentences())
    assert report_of(read("gemma")).lossy([{"role": "system", "content": "x"}, USER]) == [
        "the chat template does not take system messages"
    ]
    inline = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFine."}
    assert "reasoning inside the content" in str(report_of(read("deepseekv3")).lossy([USER, inline]))


@needs_trl
@pytest.mark.parametrize(
    "name", sorted(p.stem for p in FOLDER.glob("*.jinja") if "{% generation" in p.read_text()) if FOLDER else []
)
def test_generation_markers_and_rendering_prefixes_agree(name):
    """The mask that a template's markers give, with the stop token, is the one found without them."""
    template = read(name)
    chat = ChatText(byte_tokenizer(template))
    if not chat.report.has_generation_markers:
        pytest.skip("mentions markers in a comment only")
    # The same template with the markers taken out of Jinja's sight.
    blind = ChatText(byte_tokenizer(template))
    blind._renderer.has_generation_markers = False
    compared = 0
    for messages in CHATS.values():
        try:
            expected = trained(blind, messages)
        except TemplateError:
            continue  # the template does not take such messages
        assert trained(chat, messages) == expected
        compared += 1
    assert compared >= 2


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content SLICE }}STOP{% endgeneration %}AFTER"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_stop_token_outside_the_markers_is_trained_all_the_same(smollm2):
    template = MARKED.replace("SLICE", "").replace("STOP", "").replace("AFTER", "<|im_end|>")
    assert trained(ChatText(smollm2, template=template), [USER, ANSWER]) == [["Fine.<|im_end|>"]]


def test_markers_that_leave_out_what_was_said_are_an_error(smollm2):
    template = MARKED.replace("{% generation %}{{ m.content SLICE }}STOP", "{{ m.content }}{% generation %}<|im_end|>")
    with pytest.raises(TemplateError, match=r"leave out what the assistant says in message 1: 'Fine.'"):
        ChatText(smollm2, template=template.replace("AFTER", "")).render_conversation([USER, ANSWER])


@needs_trl
def test_a_stop_token_that_begins_the_next_message_is_trained():
    chat = ChatText(byte_tokenizer(read("glm4moe")))
    assert trained(chat, CHATS["two"]) == [["Fine.<|user|>", "Fine.<|user|>"]]
    calls, end = trained(chat, CHATS["tool"])[0]
    assert calls.endswith("</tool_call><|observation|>") and end == "Fine.<|user|>"
    user, observation = (chat._encoder.control_ids[s] for s in ("<|user|>", "<|observation|>"))
    assert {user, observation} <= set(chat.stop_ids)


@needs_trl
def test_a_call_has_its_own_stop_token():
    chat = ChatText(byte_tokenizer(read("gptoss")))
    assert trained(chat, CHATS["tool"])[0][0].endswith('<|message|>{"a": "x y"}<|call|>')
    assert {chat._encoder.control_ids[s] for s in ("<|return|>", "<|call|>")} <= set(chat.stop_ids)
    assert chat._encoder.control_ids["<|end|>"] not in chat.stop_ids


def test_a_template_without_a_stop_token_gets_the_tokenizers(smollm2):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = ChatText(smollm2, template=template)
    assert "has no stop token" in " ".join(chat.report.sentences())
    (spans,) = chat.render_conversation([USER, ANSWER])
    assert [chat.decode(s.token_ids) for s in spans if s.is_trainable] == ["Fine.\n<|im_end|>"]


@needs_trl
def test_a_header_that_asks_for_reasoning_is_not_trained():
    # DeepSeek's prompt ends with <think>, and the answered turn has none.
    chat = ChatText(byte_tokenizer(read("deepseekv3")))
    assert not chat.report.prompt_is_prefix
    for said in ("Fine.", "\nFine.", "<then>", "<think>x"):
        messages = [USER, {"role": "assistant", "content": said}]
        assert trained(chat, messages) == [[f"{said}<｜end▁of▁sentence｜>"]]
    assert trained(chat, CHATS["tool"])[0][0].startswith("<｜tool▁calls▁begin｜>")


@needs_trl
def test_tokens_that_the_assistant_may_write_are_kept_in_demonstrations():
    chat = ChatText(byte_tokenizer(read("qwen2_5")))
    call = '<tool_call>\n{"name": "add"}\n</tool_call>'
    (spans,) = chat.render_conversation([USER, {"role": "assistant", "content": call}])
    ids = [t for s in spans if s.is_trainable for t in s.token_ids]
    assert chat._encoder.control_ids["<tool_call>"] in ids
    lfm2 = read("lfm2")
    text = [USER, {"role": "assistant", "content": "<|tool_list_start|>x"}]
    for given, count in ((), 0), (("<|tool_list_start|>",), 1):
        chat = ChatText(byte_tokenizer(lfm2), assistant_tokens=given)
        (spans,) = chat.render_conversation(text)
        token = chat._encoder.control_ids["<|tool_list_start|>"]
        assert [t for s in spans if s.is_trainable for t in s.token_ids].count(token) == count


@needs_trl
def test_arguments_are_handed_over_as_the_template_wants_them():
    assert report_of(read("deepseekv3")).form.arguments == "text"
    for name in ("qwen2_5", "gemma4", "glm4moe", "llama3_1"):
        chat = ChatText(byte_tokenizer(read(name)))
        assert chat.report.form.arguments == "object"
        turn = trained(chat, CHATS["tool"])[0][0]
        assert "x y" in turn and '{\\"' not in turn and "{{" not in turn


def test_the_tool_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install trl"):
        template_folder()
