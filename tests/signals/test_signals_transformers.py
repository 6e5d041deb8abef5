"""Distillation on small transformers models: packing, LoRA, padded vocabularies, hints through a chat template."""

from dataclasses import replace

import distillation_cases as cases
import pytest
import torch

from tutelage.data.logit_cache import write_logit_cache
from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence as kl
from tutelage.policies.policy import Policy, add_lora
from tutelage.policies.teachers import InProcessTeacher, SelfTeacher
from tutelage.signals.distribution import TeacherDistribution
from tutelage.signals.minillm import MiniLLM
from tutelage.signals.routing import HintedPrompt, with_hint, with_system
from tutelage.signals.sampled import SampledLogRatio
from tutelage.testing.tiny import CHATML, tiny_model, tiny_tokenizer
from tutelage.text.chat import ChatText
from tutelage.types import Task

VOCAB = 259


def some(n=5):
    rng = torch.Generator().manual_seed(3)
    out = []
    for i in range(n):
        ids = torch.randint(0, 250, (4 + 3 * i,), generator=rng).tolist()
        y = cases.trajectory(ids, prompt=(7, 8, 9 + i), logprobs=[-2.0] * len(ids), at=str(i), weight=1.0)
        out.append(y)
    return out


def gradients(policy, signal, draw, **kwargs):
    return cases.gradient(policy, signal, draw, **kwargs)[0]


def reference(policy, teacher, ys, divergence):
    """Autograd through transformers' own forward, one trajectory at a time."""
    total, count = 0.0, 0
    policy.zero_grad()
    policy.use_plain_attention()
    for y in ys:
        tokens = torch.tensor([y.token_ids])
        at = [i - 1 for i, hit in enumerate(y.is_target) if hit]
        s = policy.model(input_ids=tokens).logits[0, at]
        with torch.no_grad():
            t = teacher.policy.model(input_ids=tokens).logits[0, at]
        width = min(s.shape[1], t.shape[1])
        total = total + divergence(s[:, :width], t[:, :width]).sum()
        count += len(at)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total / count, list(trained.values()))
    return dict(zip(trained, grads, strict=True))


def assert_near(got, want, tol=1e-5):
    scale = max(float(g.abs().max()) for g in want.values())
    worst = max(float((got[n] - want[n]).abs().max()) for n in want)
    assert worst <= tol * scale, (worst, scale)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layout,max_tokens", [("packed", 4096), ("packed", 16), ("padded", 40)])
def test_the_step_is_the_plain_forwards(lora, layout, max_tokens):
    model = tiny_model(seed=1)
    if lora:
        model = add_lora(model, r=2, alpha=4, dropout=0.0, target="all-linear", seed=0)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, 0, 0.2, generator=torch.Generator().manual_seed(0))
    policy = Policy(model, chunk_size=7)
    teacher = InProcessTeacher(tiny_model(seed=2, width=48, vocab_size=VOCAB + 5), vocab_size=VOCAB)
    ys = some()
    signal = TeacherDistribution(teacher, "jsd", beta=0.3)
    got = gradients(policy, signal, cases.draw_of(ys, on_policy=False), layout=layout, max_tokens=max_tokens)
    want = reference(policy, teacher, ys, lambda s, t: kl.jsd(s, t, 0.3, normalised=True))
    assert_near(got, want)


@pytest.mark.parametrize("make", [SampledLogRatio, MiniLLM], ids=["sampled", "minillm"])
def test_sampled_forms_do_not_depend_on_the_layout(make):
    ys = some()
    steps = []
    for layout, max_tokens, chunk in (("packed", 4096, None), ("padded", 30, 5)):
        policy = Policy(tiny_model(seed=1), chunk_size=chunk)
        signal = make(InProcessTeacher(tiny_model(seed=2), max_tokens=max_tokens))
        steps.append(gradients(policy, signal, cases.draw_of(ys), layout=layout, max_tokens=max_tokens))
    assert_near(steps[1], steps[0])


def test_live_and_cached_teachers_give_one_step(tmp_path):
    ys = some()
    teacher = InProcessTeacher(tiny_model(seed=2))
    draw = cases.draw_of(ys, on_policy=False)
    cache = write_logit_cache(tmp_path, ys, teacher, vocab_size=VOCAB, tokenizer="", k=VOCAB, precision="float32")
    steps = [
        gradients(Policy(tiny_model(seed=1)), TeacherDistribution(t, "reverse_kl"), draw) for t in (teacher, cache)
    ]
    assert_near(steps[1], steps[0])
    assert cache.fidelity["all"]["max_kl_nats"] < 1e-6


def test_bfloat16_teachers_are_close():
    ys = some()
    draw = cases.draw_of(ys, on_policy=False)
    policy = Policy(tiny_model(seed=1))
    full, half = (
        gradients(policy, TeacherDistribution(InProcessTeacher(tiny_model(seed=2, dtype=dtype)), "forward_kl"), draw)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert_near(half, full, tol=0.1)


# -- hints ----------------------------------------------------------------------------------------------------------


def asked(text, answer="4"):
    task = Task(id="q", messages=({"role": "user", "content": "2+2?"},), answer=answer)
    prompt = text.render_prompt(task)
    y = cases.trajectory(tuple(text.tokenizer("4!")["input_ids"]), name="q")
    return task, replace(y, spans=(*prompt, y.spans[-1]))


@pytest.mark.parametrize(
    "hint,words",
    [(with_system("Be brief."), "Be brief."), (with_hint("The answer is {answer}."), "The answer is 4.")],
)
def test_the_teacher_is_told_more_in_its_own_prompt(hint, words):
    text = ChatText(tiny_tokenizer())
    task, y = asked(text)
    seen = HintedPrompt(text, hint)(task, y)
    shown, own = text.decode(seen.token_ids), text.decode(y.token_ids)
    assert words in shown and words not in own and shown.count("2+2?") == 1
    assert seen.token_ids[-2:] == y.token_ids[-2:] and seen.num_targets == y.num_targets == 2
    assert shown.endswith("<|im_start|>assistant\n4!")


def test_a_hint_that_needs_what_the_task_lacks_is_refused():
    text = ChatText(tiny_tokenizer())
    task, y = asked(text, answer=None)
    with pytest.raises(DataError, match="has none"):
        HintedPrompt(text, with_hint("{answer}"))(task, y)
    with pytest.raises(DataError, match="'plan'"):
        HintedPrompt(text, with_hint("{plan}"))(task, y)
    for template in ("{answer.foo}", "{answer[plan]}", "{answer[9]}", "{answer:d}"):
        with pytest.raises(DataError, match="the hint"):
            HintedPrompt(text, with_hint(template))(replace(task, answer="4"), y)


@pytest.mark.parametrize("template", ["{}", "{0}", "a { b", "b } a", "{.foo}"])
def test_a_hint_that_is_no_template_is_refused_before_any_task_is_seen(template):
    with pytest.raises(ConfigError, match="named fields"):
        with_hint(template)


def test_braces_can_be_part_of_a_hint():
    task = Task(id="q", messages=({"role": "user", "content": "2+2?"},), answer="4")
    assert with_hint("{{answer}} is {answer}")(task).messages[0]["content"] == "2+2?\n\n{answer} is 4"


def test_self_distillation_moves_the_student_towards_its_hinted_self():
    text = ChatText(tiny_tokenizer())
    task, y = asked(text)
    policy = Policy(tiny_model(seed=1))
    teacher = SelfTeacher(policy)
    view = HintedPrompt(text, with_hint("The answer is {answer}."))
    draw = replace(cases.draw_of([y]), groups=(replace(cases.draw_of([y]).groups[0], task=task),))
    signal = TeacherDistribution(teacher, "forward_kl", view=view)
    got = gradients(policy, signal, draw)
    policy.use_plain_attention()
    seen = view(task, y)
    s = policy.model(input_ids=torch.tensor([y.token_ids])).logits[0, -3:-1]
    with torch.no_grad():
        t = policy.model(input_ids=torch.tensor([seen.token_ids])).logits[0, -3:-1]
    trained = dict(policy.named_parameters())
    want = dict(zip(trained, torch.autograd.grad(kl.forward_kl(s, t).mean(), list(trained.values())), strict=True))
    assert_near(got, want)


OPENED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
THINKING = CHATML.replace(
    "+ (message['content'] or '')",
    "+ ('<think></think>' if message['role'] == 'assistant' else '') + (message['content'] or '')",
)


def said(*texts, tool=()):
    roles = ["tool" if i in tool else "user" if i % 2 == 0 else "assistant" for i in range(len(texts))]
    return tuple({"role": r, "content": c} for r, c in zip(roles, texts, strict=True))


def recorded(text, messages, **options):
    last = max(i for i, m in enumerate(messages) if m["role"] != "assistant")
    task = Task(id="q", messages=messages[: last + 1], answer="4")
    return [
        (task, replace(cases.trajectory((1,)), spans=tuple(spans), messages=messages))
        for spans in text.render_conversation(messages, **options)
    ]


@pytest.mark.parametrize("template", [CHATML, OPENED, THINKING], ids=["plain", "opened", "closed"])
@pytest.mark.parametrize("train", ["all", "last"])
@pytest.mark.parametrize("tool", [(), (2,)], ids=["two questions", "a tool's result"])
def test_in_a_conversation_the_hint_goes_before_the_first_trained_turn(template, train, tool):
    text = ChatText(tiny_tokenizer(), template=template)
    messages = said("A?", "one", "B?", "two", tool=tool)
    [(task, own)] = recorded(text, messages, train=train)
    seen = text.decode(HintedPrompt(text, with_hint("psst"))(task, own).token_ids)
    asked = "B?" if train == "last" else "A?"
    assert seen == text.decode(own.token_ids).replace(asked, f"{asked}\n\npsst")
    told = text.decode(HintedPrompt(text, with_system("Be brief."))(task, own).token_ids)
    assert told == "<|im_start|>system\nBe brief.<|im_end|>\n" + text.decode(own.token_ids)


def test_each_part_of_a_split_conversation_gets_the_hint():
    text = ChatText(tiny_tokenizer())
    messages = said("A?", "one", "B?", "two", "C?", "three")
    parts = recorded(text, messages, overlong="split", max_tokens=45)
    assert len(parts) == 3
    for (task, own), asked in zip(parts, "ABC", strict=True):
        seen = text.decode(HintedPrompt(text, with_hint("psst"))(task, own).token_ids)
        assert seen.count("psst") == 1 and seen == text.decode(own.token_ids).replace(f"{asked}?", f"{asked}?\n\npsst")


def test_a_prompt_that_is_not_of_its_messages_cannot_be_hinted():
    text = ChatText(tiny_tokenizer())
    [(task, own)] = recorded(text, said("A?", "one"))
    other = replace(task, messages=said("B?"))
    with pytest.raises(DataError, match="not what the chat template makes of its messages"):
        HintedPrompt(text, with_hint("psst"))(other, replace(own, messages=()))
