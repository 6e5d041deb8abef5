"""Prompts and demonstrations on the tokenizer of SmolLM2."""

import pytest

from tutelage.text import ChatText

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def chat(smollm2) -> ChatText:
    return ChatText(smollm2)


def test_a_prompt_is_what_the_tokenizer_itself_makes_of_it(chat, smollm2):
    assert (
        list(chat.prompt_ids(QUESTION)) == smollm2.apply_chat_template(QUESTION, add_generation_prompt=True).input_ids
    )


def test_what_the_assistant_says_and_its_stop_token_are_trained(chat):
    (spans,) = chat.render_conversation([*QUESTION, {"role": "assistant", "content": "7"}])
    trained = [t for s in spans if s.is_trainable for t in s.token_ids]
    assert chat.decode(trained) == "7<|im_end|>"
