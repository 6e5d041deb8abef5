"""What flows through the library: tasks, completions, verdicts, trajectories, and a round's draw of them.

Token frame: every per-token tuple here has one entry per token of the span or trajectory and describes
*that* token. The shift to "position t predicts token t + 1" happens once, in `data.collate`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from tutelage.errors import DataError

Message = Mapping[str, Any]
"""One chat message in OpenAI form: `role`, `content` (str or None), and optionally `reasoning_content`,
`tool_calls` (arguments stay the raw JSON string), `tool_call_id`, `name`."""


def content_hash(*parts: Any) -> str:
    """16 hex digits of SHA-256 over the parts as canonical JSON: equal content, equal hash, on any machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_for(*parts: int | str) -> int:
    """63-bit seed that depends on every part, so each (seed, stage, round, prompt, sample) has its own stream."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. The same numbers shape the log-probabilities that are stored with them."""

    temperature: float = 1.0
    """Divides the logits before sampling. 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability (after temperature) reaches this."""
    max_new_tokens: int = 512
    """Longest completion in tokens, stop token included."""
    stop: tuple[str, ...] = ()
    """Stop as soon as the text of the completion contains one of these, besides the end-of-turn token."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def samples_own_distribution(self) -> bool:
        """True where the draw is from the model's own, unshaped distribution."""
        return self.temperature == 1 and self.top_p == 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question: what is asked, and what a verifier needs in order to judge an answer."""

    id: str
    """Unique within its data set; stable between runs."""
    messages: tuple[Message, ...]
    """The prompt as chat messages, ending where the assistant is to speak."""
    answer: str | None = None
    """The gold answer, where there is one. Never shown to the model (a hint-giving source may, and says so)."""
    name: str = "default"
    """The task family, for results by task and for routing to a teacher."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the verifier needs besides the answer (JSON values)."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions in OpenAI form, shown to the model by its chat template."""

    @cached_property
    def hash(self) -> str:
        """Hash of what the model is asked (task family, messages, tools): equal questions, equal hash."""
        return content_hash(self.name, [dict(m) for m in self.messages], [dict(t) for t in self.tools])


class Status(StrEnum):
    """A verdict has three values. An error says nothing about the completion and leaves every statistic."""

    ACCEPT = "accept"
    REJECT = "reject"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier says of one completion."""

    status: Status
    score: float | None = None
    """Usually in [0, 1]; None for an error. Finite otherwise."""
    reason: str = ""
    """One line for a person: what was extracted, or why it failed."""
    verifier: str = ""
    """Name of the verifier."""
    version: str = ""
    """Its version, so that stored verdicts can be told apart after a change."""
    key: str | None = None
    """The task's own notion of 'the same solution', for distinctness; None means the text itself."""

    @property
    def is_accepted(self) -> bool:
        return self.status is Status.ACCEPT


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Ask a sampler for `n` completions of one prompt."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    """Sample j draws from the stream seed_for(seed, j): independent of what else is in the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, exactly as it was sampled."""

    token_ids: tuple[int, ...]
    """(L,) the sampled tokens, the stop token included where one was sampled."""
    logprobs: tuple[float, ...] | None
    """(L,) nats, under the distribution that was sampled (temperature and top-p included). None if unknown."""
    entropies: tuple[float, ...] | None
    """(L,) nats, exact entropy of the model's unshaped distribution at each step. None if unknown."""
    finish: str
    """"stop" (the model ended its turn), "stop_string", or "length"."""
    text: str
    """The completion as text, without its stop token."""

    def as_span(self, author: str, version: str | None, params: SamplingParams | None) -> "Span":
        """The span of a sampled turn: its ids as they were sampled, the stop token included where there is one."""
        return Span(
            token_ids=self.token_ids,
            role="assistant",
            author=author,
            is_sampled=True,
            is_trainable=True,
            logprobs=self.logprobs,
            entropies=self.entropies,
            policy_version=version,
            sampling=params,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive tokens with one author."""

    token_ids: tuple[int, ...]
    role: str
    """Chat role: "system", "user", "assistant", "tool"; "template" for the control tokens between them."""
    author: str
    """Whose choice the tokens are: "template", "user", "environment", "human", "student", "teacher", a model's name."""
    is_sampled: bool = False
    """True where the author chose these tokens one by one, so that they may be imitated."""
    is_trainable: bool = False
    """True where loss may fall: a subset of what is sampled (copied context and demos are sampled, not trainable)."""
    logprobs: tuple[float, ...] | None = None
    """(L,) nats, under the author as it sampled. None if unknown."""
    entropies: tuple[float, ...] | None = None
    """(L,) nats, exact, of the author's unshaped distribution. None if unknown."""
    policy_version: str | None = None
    """Which weights wrote it, e.g. "stage0-round1-step40"; None for people, tools and templates."""
    sampling: SamplingParams | None = None
    is_context_exact: bool = True
    """False once anything before the span was changed after it was sampled (a stripped hint): such a span has no
    behaviour log-probabilities and is not on-policy."""

    def __post_init__(self) -> None:
        for name in ("logprobs", "entropies"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise DataError(
                    f"Span.{name} needs one entry per token ({len(self.token_ids)}), got {len(values)} "
                    f"(role {self.role!r}, author {self.author!r})"
                )
        if self.is_trainable and not self.is_sampled:
            raise DataError(
                f"a span of role {self.role!r} by {self.author!r} is marked trainable but not sampled: "
                "only tokens that their author chose may be imitated"
            )


RECORDED = "recorded"
"""A trajectory's mark: it was there before the draw, beside others that were sampled for it."""
REPLAYED = "replayed"
"""A trajectory's mark: it was sampled for an earlier draw."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One conversation or episode: who wrote each token, what was said, and how it was judged."""

    id: str
    task_id: str
    task_hash: str
    spans: tuple[Span, ...]
    """The exact tokens in order. Empty only for imported records that have no tokens yet."""
    messages: tuple[Message, ...] = ()
    """The same conversation as chat messages, prompt included."""
    completion: str = ""
    """Text of the last sampled turn, without its stop token: what a single-turn verifier reads."""
    task_name: str = "default"
    prompt_index: int = 0
    """Index of the prompt in its draw."""
    sample_index: int = 0
    """Index of the sample within its prompt."""
    finish: str = "stop"
    """Why it ended: "stop", "stop_string", "length", "limit", "error", or the harness's own word."""
    verdict: Verdict | None = None
    weight: float = 1.0
    """Weight of its targets in the loss. Keep rules set 0 or 1; 0 stays in the draw's statistics."""
    marks: tuple[str, ...] = ()
    """Why a keep rule left it out, or what else happened to it, e.g. "rejected", "duplicate", "truncated"."""
    parent: str | None = None
    """The trajectory this one branches from: the shared prefix is trained once."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer whose ids these are."""
    origin: str = ""
    """For imports: `file:line` it came from."""
    licence: str = ""
    """Licence and terms of the author's outputs, where known."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping (JSON values)."""

    @property
    def is_truncated(self) -> bool:
        return self.finish == "length"

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.spans)

    @property
    def num_sampled(self) -> int:
        return sum(len(s.token_ids) for s in self.spans if s.is_sampled)

    @property
    def num_targets(self) -> int:
        """Tokens that loss may fall on. The very first token has no context and is never one."""
        first = next((s for s in self.spans if s.token_ids), None)
        counted = sum(len(s.token_ids) for s in self.spans if s.is_trainable)
        return counted - (first is not None and first.is_trainable)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(t for s in self.spans for t in s.token_ids)

    @property
    def is_target(self) -> tuple[bool, ...]:
        """(L,) True where loss may fall. Never the first token."""
        flags = [s.is_trainable for s in self.spans for _ in s.token_ids]
        if flags:
            flags[0] = False
        return tuple(flags)

    @property
    def behaviour_logprobs(self) -> tuple[float, ...] | None:
        """(L,) nats under the author as sampled; 0 off-target; None if any target's is unknown or no longer exact."""
        out: list[float] = []
        for s in self.spans:
            if not s.is_trainable:
                out.extend([0.0] * len(s.token_ids))
            elif s.logprobs is None or not s.is_context_exact:
                return None
            else:
                out.extend(s.logprobs)
        return tuple(out)

    def marked(self, mark: str, *, weight: float = 0.0) -> "Trajectory":
        """A copy with one more mark and the given weight."""
        return replace(self, weight=weight, marks=(*self.marks, mark))


@dataclass(frozen=True, kw_only=True)
class Group:
    """All trajectories of one prompt in one draw."""

    task: Task
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One round's trajectories by prompt. Nothing is ever removed from it: keep rules set weights."""

    groups: tuple[Group, ...]
    author: str = ""
    """Who wrote the trained tokens: "recorded", "student", "teacher", or "mixed"."""
    is_on_policy: bool = False
    """True where the trained tokens were sampled from the current policy as it is scored in training."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """What the sources report of this draw: counts, shares, times; names carry their units."""

    def __iter__(self) -> Iterator[Trajectory]:
        for group in self.groups:
            yield from group.trajectories

    def __len__(self) -> int:
        return sum(len(g.trajectories) for g in self.groups)

    def is_fresh(self, trajectory: Trajectory) -> bool:
        """True for a trajectory that was sampled for this draw, neither recorded nor replayed."""
        return self.author != RECORDED and not {RECORDED, REPLAYED} & {*trajectory.marks}

    def kept(self) -> list[Trajectory]:
        """Trajectories with a weight other than 0 and something to train on, in draw order."""
        return [t for t in self if t.weight != 0 and t.num_targets > 0]

    def with_trajectories(self, trajectories: Iterable[Trajectory], **stats: float) -> "Draw":
        """The same groups with each trajectory replaced, in order; further stats are added.

        Raises:
            DataError: the number of trajectories differs: a draw never loses or gains any.
        """
        new = list(trajectories)
        if len(new) != len(self):
            raise DataError(f"a draw of {len(self)} trajectories cannot be rewritten with {len(new)}: none may be lost")
        groups, start = [], 0
        for g in self.groups:
            stop = start + len(g.trajectories)
            groups.append(replace(g, trajectories=tuple(new[start:stop])))
            start = stop
        return replace(self, groups=tuple(groups), stats={**self.stats, **stats})


def prompt_key(messages: Sequence[Message]) -> str:
    """Hash of a prompt's messages alone."""
    return content_hash([dict(m) for m in messages])
