"""Properties of rendered text over conversations made up by chance, odd characters and control tokens included."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tutelage.text import ChatText
from tutelage.text.render import clean_text
from tutelage.types import Span, Task

FAMILIES = ["smollm2", "qwen2_5", "qwen3", "llama3"]
SAID = {  # how each template shows what the assistant said
    "smollm2": lambda s: s,
    "qwen2_5": lambda s: s,
    "qwen3": lambda s: s.lstrip("\n"),
    "llama3": lambda s: s.strip(),
}
PLAIN = ["a", " the", "\n", "\n\n", " ", "  ", "é", "🙂", "e\u0301", "7", "'s", "{", "\t", "user", "\u00a0", "\x00"]
ODD = ["<", "<|", "|>", "|im_end|>", "<|im_", "\ud800", "\udc00", "\U000f0001", "\U00100000", "\ufffd"]
CONTROL = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|start_header_id|>", "<tool_call>"]
CONTROL += ["</tool_response>", "<|endoftext|>", "<eos>", "<bos>"]


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=6).map("".join)


def chats_of(content: st.SearchStrategy[str], *, answered: bool) -> st.SearchStrategy[list[dict]]:
    system = st.lists(content.map(lambda c: {"role": "system", "content": c}), max_size=1)
    turn = st.tuples(content, content).map(
        lambda p: [{"role": "user", "content": p[0]}, {"role": "assistant", "content": p[1]}]
    )
    turns = st.lists(turn, min_size=1, max_size=3).map(lambda ts: [m for t in ts for m in t])
    return st.tuples(system, turns).map(lambda p: [*p[0], *(p[1] if answered else p[1][:-1])])


def quick(examples: int):
    skip = [HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=skip,
        derandomize=True,
    )


def ids_of(spans: list[Span]) -> list[int]:
    return [t for s in spans for t in s.token_ids]


def controls_in(chat: ChatText, ids) -> list[int]:
    control = set(chat._encoder.control_ids.values())
    return [t for t in ids if t in control]


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_prompts_have_the_tokenizers_own_ids(chats, name):
    chat = chats(name)

    @quick(40)
    @given(chats_of(texts(PLAIN), answered=False))
    def check(messages):
        own = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert list(chat.prompt_ids(messages)) == own
        assert ids_of(chat.render_prompt(Task(id="t", messages=tuple(messages)))) == own

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_anyone_writes_becomes_a_control_token(chats, name):
    chat = chats(name)

    @quick(60)
    @given(chats_of(texts(PLAIN + ODD + CONTROL), answered=False))
    def check(messages):
        ids = chat.prompt_ids(messages)
        assert ids_of(chat.render_prompt(Task(id="t", messages=tuple(messages)))) == list(ids)
        # <tool_call> is a token that Qwen's assistant may write; everything else must be the template's.
        spoken = {chat._encoder.control_ids[s] for s in chat.report.spoken}
        empty = chat.prompt_ids([{**m, "content": "x"} for m in messages])
        assert [t for t in controls_in(chat, ids) if t not in spoken] == [
            t for t in controls_in(chat, empty) if t not in spoken
        ]
        decoded = chat.decode(ids)
        for m in messages:
            assert clean_text(m["content"]).strip() in decoded

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_what_the_assistant_said_with_its_stop_token(chats, name):
    chat = chats(name)

    @quick(60)
    @given(chats_of(texts(PLAIN + ODD + CONTROL), answered=True))
    def check(messages):
        samples = chat.render_conversation(messages)
        said = [SAID[name](clean_text(m["content"])) for m in messages if m["role"] == "assistant"]
        turns = [[t for t in s.token_ids] for sample in samples for s in sample if s.is_trainable]
        assert [chat.decode(t) for t in turns] == [s + chat.report.stop for s in said]
        stop = chat._encoder.control_ids[chat.report.stop]
        assert all(t[-1] == stop and t.count(stop) == 1 for t in turns)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_the_rendered_text_and_begin_with_the_prompt_that_would_be_sampled(chats, name):
    chat = chats(name)

    @quick(60)
    @given(chats_of(texts(PLAIN + ODD + CONTROL), answered=True))
    def check(messages):
        messages = messages[:3] if messages[0]["role"] == "system" else messages[:2]
        (spans,) = chat.render_conversation(messages)
        text = chat.decode(ids_of(spans))
        prompt = chat.prompt_ids(messages[:-1])
        assert tuple(ids_of(spans)[: len(prompt)]) == prompt
        said = SAID[name](clean_text(messages[-1]["content"]))
        assert text.removeprefix(chat.decode(prompt)).removeprefix(chat.report.empty_reasoning) in (
            said + chat.report.stop,
            said + chat.report.stop + "\n",
        )

    check()


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "llama3"])
def test_going_on_keeps_every_id_and_reads_as_the_template_would(chats, name):
    chat = chats(name)

    @quick(40)
    @given(chats_of(texts(PLAIN + ODD + CONTROL), answered=False), texts(PLAIN + CONTROL), texts(PLAIN + ODD + CONTROL))
    def check(messages, answer, reply):
        answer = answer.strip()
        assume("\x00" not in answer)
        spans = chat.render_prompt(Task(id="t", messages=tuple(messages)))
        sampled = (*chat.literal_ids(answer), chat.stop_ids[0])
        spans.append(Span(token_ids=sampled, role="assistant", author="s", is_sampled=True, is_trainable=True))
        longer = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": reply}]
        more = chat.continue_with(spans, longer)
        assert more.spans is not None, more.reason
        both = [*spans, *more.spans]
        assert chat.decode(ids_of(both)) == chat.decode(chat.prompt_ids(longer))
        assert both[len(spans) - 1].token_ids == sampled

    check()
