"""Teachers whose weights are in this process: what they say at every target, and whether they fit the student.

Dimension letters:  N  targets of a batch   E  teacher's hidden width   V  vocabulary   K  top-k entries

A teacher hands over hidden states and its output layer, never (N, V) logits: the loss makes the logits of one chunk of
targets at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.collate import Batch, collate
from tutelage.data.files import tensor_file_errors
from tutelage.data.logit_cache import TopK
from tutelage.data.pack import microbatches
from tutelage.errors import CheckpointError, ConfigError, DataError, SamplerError
from tutelage.numerics.logprobs import at_least_float32, target_logprobs
from tutelage.policies.load import load_model
from tutelage.policies.policy import OutputLayer, Policy
from tutelage.types import TargetRow, Trajectory

_CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time while scoring."""
_LEAST_TAIL = 1e-7
"""Mass a server's answer is taken to leave, at least: its float32 probabilities add up to 1 only so far."""


class InProcessTeacher:
    """A frozen model as the teacher: its hidden states at the student's targets, and its output layer.

    Args:
        model: a transformers causal model, or anything with `target_hidden(batch)` and `output_layer`.
        name: for metrics and messages.
        vocab_size: its vocabulary is cut to this many entries, where it shares only these with the student
            (`check_vocabulary` says how many). None keeps all.
        max_tokens: tokens run at a time when whole draws are scored.
        processes: `train.Processes`; scoring is shared out among them. None scores everything here.
    """

    form = "hidden"
    is_fixed = True
    """True where its answers cannot change during a run."""
    scores_at_temperature = True
    """True where `score` takes temperatures."""

    def __init__(
        self,
        model: Any,
        *,
        name: str = "teacher",
        vocab_size: int | None = None,
        max_tokens: int = 8192,
        processes: Any = None,
    ) -> None:
        self.policy = model if hasattr(model, "target_hidden") else Policy(model)
        self.name, self.vocab_size, self.max_tokens, self.processes = name, vocab_size, max_tokens, processes
        self.num_scored_tokens = 0
        """Tokens run through the teacher so far, prompts included."""
        self.on_scored: Callable[[Sequence[int], int], None] | None = None
        """Called with the documents' lengths and the number of targets of every batch: what a ledger counts."""
        self._freeze()

    def _freeze(self) -> None:
        self.policy.eval()
        self.policy.requires_grad_(False)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The policy as the teacher sees it."""
        yield

    @property
    def supports_packing(self) -> bool:
        return bool(self.policy.supports_packing)

    @property
    def layout(self) -> str:
        return "packed" if self.supports_packing else "padded"

    @property
    def output_layer(self) -> OutputLayer:
        """Without gradients, cut to the shared vocabulary."""
        layer = self.policy.output_layer
        cut = slice(None, self.vocab_size)
        bias = None if layer.bias_V is None else layer.bias_V.detach()[cut]
        return OutputLayer(layer.weight_VD.detach()[cut], bias, layer.transform)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """(N, E) hidden states at the batch's targets, on the batch's device."""
        here = batch.token_ids_BT.device
        device = self.output_layer.weight_VD.device
        self.num_scored_tokens += batch.num_tokens
        if self.on_scored is not None:
            self.on_scored(_lengths(batch), batch.num_targets)
        with self._in_use():
            hidden_NE: Tensor = self.policy.target_hidden(batch if here == device else batch.to(device))
        self.policy.use_plain_attention()  # others may call the same model next
        return hidden_NE.to(here)

    # -- whole draws ---------------------------------------------------------------------------

    def score(
        self, trajectories: Sequence[Trajectory], *, temperature: Sequence[Any] | None = None
    ) -> list[Sequence[float]]:
        """Nats per target token of each trajectory, in target order.

        Args:
            temperature: for each trajectory (num_targets,), what the teacher's logits are divided by. None: 1.
        """
        columns = None if temperature is None else [{"temperature_C": t} for t in temperature]
        out: dict[int, Sequence[float]] = {}
        for indices, batch in self._batches(trajectories, columns):
            logprobs_N = self.target_logprobs(batch).cpu()
            for place, index in enumerate(indices):
                out[index] = logprobs_N[batch.row_index_C == place].tolist()
        return self._gathered(out, trajectories)

    def target_logprobs(self, batch: Batch) -> Tensor:
        """(N,) nats of the batch's targets; the logits are divided by the column `temperature_C` where there is one."""
        found = []
        for part, logits_CV in self._chunks(batch):
            if "temperature_C" in batch.columns:
                logits_CV = logits_CV / batch.columns["temperature_C"][part].to(logits_CV).unsqueeze(-1)
            found.append(target_logprobs(logits_CV, batch.columns["target_ids_C"][part].to(logits_CV.device)))
        return torch.cat(found) if found else torch.zeros(0)

    def top_k(self, trajectories: Sequence[Trajectory], k: int, *, temperature: float = 1.0) -> list[TopK]:
        """The k most likely tokens at every target of each trajectory, and the mass of all others.

        k of at least the vocabulary gives all of it, with no tail.
        """
        out: dict[int, TopK] = {}
        for indices, batch in self._batches(trajectories, None):
            parts = [top_k_of(logits_CV / temperature, k) for _, logits_CV in self._chunks(batch)]
            joined = TopK(*(np.concatenate([p[i] for p in parts]) for i in range(3)))
            for place, index in enumerate(indices):
                own = (batch.row_index_C == place).numpy()
                out[index] = TopK(*(column[own] for column in joined))
        return self._gathered(out, trajectories)

    def full_logprobs(self, trajectory: Trajectory, limit: int, *, temperature: float = 1.0) -> Tensor:
        """(at most `limit`, V) log-probabilities at the trajectory's first targets: what a cache is checked against."""
        row = TargetRow(trajectory=trajectory, columns={"weight_C": np.ones(trajectory.num_targets)}, count=0.0)
        batch = collate([row], layout=self.layout)  # type: ignore[arg-type]
        found = [(logits_CV / temperature).log_softmax(-1) for _, logits_CV in self._chunks(batch)]
        return torch.cat(found)[:limit]

    @torch.no_grad()
    def _chunks(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Runs of targets with their logits, float32 or float64."""
        hidden_NE, layer = self.hidden(batch), self.output_layer
        size = max(1, _CHUNK_ELEMENTS // len(layer.weight_VD))
        for start in range(0, len(hidden_NE), size):
            part = slice(start, start + size)
            logits_CV = layer.logits(hidden_NE[part].to(layer.weight_VD))
            yield part, logits_CV.to(at_least_float32(logits_CV))

    def _batches(
        self, trajectories: Sequence[Trajectory], columns: Sequence[Mapping[str, Any]] | None
    ) -> Iterator[tuple[list[int], Batch]]:
        """This process's share of the trajectories, in batches within the token budget, with their indices."""
        limit = self.output_layer.weight_VD.shape[0]
        rows = []
        for i, t in enumerate(trajectories):
            if t.token_ids and max(t.token_ids) >= limit:
                raise DataError(
                    f"trajectory {t.id!r} has token id {max(t.token_ids)}, and teacher {self.name!r} shares only ids "
                    f"below {limit} with the student: it cannot score it"
                )
            extra = columns[i] if columns is not None else {}
            rows.append(TargetRow(trajectory=t, columns={"weight_C": np.ones(t.num_targets), **extra}, count=0.0))
        parts = microbatches(
            [(i, r) for i, r in enumerate(rows) if r.trajectory.num_targets],
            max_tokens=self.max_tokens,
            length=lambda pair: pair[1].trajectory.num_tokens,
            layout=self.layout,  # type: ignore[arg-type]
        )
        dtype = self.output_layer.weight_VD.dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        for part in parts if self.processes is None else self.processes.share(parts):
            yield [i for i, _ in part], collate([r for _, r in part], layout=self.layout, dtype=dtype)  # type: ignore[arg-type]

    def _gathered(self, out: dict[int, Any], trajectories: Sequence[Trajectory]) -> list[Any]:
        if self.processes is not None:
            out = self.processes.gather_dict(out)
        empty = TopK.empty() if any(isinstance(v, TopK) for v in out.values()) else []
        return [out.get(i, empty) for i in range(len(trajectories))]

    # -- state ---------------------------------------------------------------------------------

    def after_step(self, policy: Any) -> None:
        """A frozen teacher stays as it is."""

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """There is no state."""

    def save(self, folder: Path) -> None:
        """There is nothing to save: the weights are where they were loaded from."""

    def load(self, folder: Path) -> None:
        """There is nothing to load."""


class SelfTeacher(InProcessTeacher):
    """The student as its own teacher: useful where the teacher is told more than the student (a hint in its context).

    Args:
        policy: the trained policy.
        weights: "current", the weights of this very step; "base", the model without its LoRA adapters.
    """

    is_fixed = False

    def __init__(self, policy: Any, *, weights: str = "current", name: str = "self", **options: Any) -> None:
        if weights not in ("current", "base"):
            raise ConfigError(f'weights must be "current" or "base", got {weights!r}; AveragedTeacher averages them')
        if weights == "base" and not hasattr(policy.model, "disable_adapter"):
            raise ConfigError(
                'weights="base" needs a policy with LoRA adapters, whose base model is still there; '
                "with full training give the base model as a teacher of its own"
            )
        self.weights = weights
        self.is_fixed = weights == "base"
        super().__init__(policy, name=name, **options)

    def _freeze(self) -> None:
        """It is being trained: nothing to freeze."""

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        training = [m for m in self.policy.modules() if m.training]
        self.policy.eval()
        try:
            with self.policy.model.disable_adapter() if self.weights == "base" else nullcontext():
                yield
        finally:
            for module in training:
                module.training = True


class AveragedTeacher(SelfTeacher):
    """An exponential average of the student's own weights as the teacher.

    average <- decay * average + (1 - decay) * weights, after every optimiser step; it begins as the weights are now.

    Only trained parameters are averaged (with LoRA: the adapters); the rest is shared with the student.

    Args:
        policy: the trained policy.
        decay: in [0, 1). 0 follows the student exactly, 0.99 remembers about 100 steps.
    """

    FILE = "averaged_teacher.safetensors"

    def __init__(self, policy: Any, *, decay: float = 0.99, name: str = "average", **options: Any) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be in [0, 1), got {decay}: 1 would never move")
        self.decay = decay
        self.num_updates = 0
        super().__init__(policy, name=name, **options)
        trained = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self._parameters = trained
        self.average = {n: p.detach().to(at_least_float32(p), copy=True) for n, p in trained.items()}
        """Name -> averaged weight, in float32 or wider."""

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with super()._in_use():
            kept = {n: p.data for n, p in self._parameters.items()}
            try:
                for n, p in self._parameters.items():
                    p.data = self.average[n].to(p.dtype)
                yield
            finally:
                for n, p in self._parameters.items():
                    p.data = kept[n]

    @property
    def output_layer(self) -> OutputLayer:
        layer = self.policy.output_layer
        cut = slice(None, self.vocab_size)
        weight = self._averaged(layer.weight_VD)[cut]
        return OutputLayer(weight, None if layer.bias_V is None else self._averaged(layer.bias_V)[cut], layer.transform)

    def _averaged(self, weight: Tensor) -> Tensor:
        for n, p in self._parameters.items():
            if p is weight:
                return self.average[n].to(weight.dtype)
        return weight.detach()

    @torch.no_grad()
    def after_step(self, policy: Any) -> None:
        for n, p in self._parameters.items():
            self.average[n].lerp_(p.detach().to(self.average[n].dtype), 1 - self.decay)
        self.num_updates += 1

    def state(self) -> Mapping[str, Any]:
        return {"num_updates": self.num_updates, "decay": self.decay}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The counts; the weights come back with `load`."""
        self.num_updates = int(state["num_updates"])

    def save(self, folder: Path) -> None:
        """Write the averaged weights, exactly."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with tensor_file_errors(folder / self.FILE):
            save_file({n: a.contiguous().cpu() for n, a in self.average.items()}, folder / self.FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or has other parameters.
        """
        from safetensors.torch import load_file

        path = folder / self.FILE
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the averaged teacher cannot go on without its weights")
        kept = load_file(path)
        if kept.keys() != self.average.keys():
            odd = sorted(kept.keys() ^ self.average.keys())[:3]
            raise CheckpointError(f"{path} averages other parameters than this policy trains, e.g. {odd}")
        for n, a in self.average.items():
            a.copy_(kept[n])


class ServedTeacher:
    """A teacher behind a server that gives its most likely tokens, or the log-probabilities of given ones.

    Args:
        scorer: something with `top_k(trajectories, k)`, whose answers have `ids_CK` and `logprobs_CK`, and `score`:
            `VLLMScorer`.
        k: entries asked for at every target.
        vocab_size: the student's logits are cut to this many entries, where the server's model has fewer.
        processes: `train.Processes`; the asking is shared out among them. None asks for everything here.
    """

    form = "top_k"
    is_lazy = False
    is_fixed = True
    temperature = 1.0

    def __init__(
        self,
        scorer: Any,
        *,
        k: int = 64,
        vocab_size: int | None = None,
        name: str = "teacher",
        processes: Any = None,
    ) -> None:
        self.scorer, self.k, self.vocab_size, self.name = scorer, k, vocab_size, name
        self.processes = processes
        self.on_scored: Callable[[Sequence[int], int], None] | None = None
        """Called with the trajectories' lengths and the number of targets this process asked for."""

    def _asked(self, trajectories: Sequence[Trajectory], ask: Callable[[Sequence[Trajectory]], Any]) -> list[Any]:
        """The answers to this process's share, and everybody's."""
        indices = list(range(len(trajectories)))
        mine = indices if self.processes is None else list(self.processes.share(indices))
        own = [trajectories[i] for i in mine]
        if self.on_scored is not None:
            self.on_scored([t.num_tokens for t in own], sum(t.num_targets for t in own))
        if self.processes is None:
            return list(ask(own))
        failed, done = None, {}
        try:
            done = dict(zip(mine, ask(own), strict=True))
        except SamplerError as error:
            failed = error
        merged = self.processes.gather_or_stop(done, failed)
        return [merged[i] for i in indices]

    def top_k(self, trajectories: Sequence[Trajectory]) -> list[TopK]:
        """Its answers with the log of the mass they leave, which float32 answers never put at exactly 0."""
        out = []
        for answer in self._asked(trajectories, lambda own: self.scorer.top_k(own, self.k)):
            logprobs = np.asarray(answer.logprobs_CK, dtype=np.float64)
            rest = np.maximum(1 - np.exp(logprobs).sum(-1), _LEAST_TAIL)
            out.append(TopK(np.asarray(answer.ids_CK, dtype=np.int64), logprobs, np.log(rest)))
        return out

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        """Nats per target token of each trajectory, at temperature 1."""
        return self._asked(trajectories, self.scorer.score)


def _lengths(batch: Batch) -> list[int]:
    """Tokens of each document of a batch."""
    if batch.cu_seqlens is not None:
        return list(batch.cu_seqlens.diff().tolist())
    assert batch.attention_mask_BT is not None
    return list(batch.attention_mask_BT.sum(1).tolist())


def top_k_of(logits_CV: Tensor, k: int) -> TopK:
    """Exact top-k of each row with the log of the remaining mass, most likely first; ties by id.

    The tail is summed over the entries left out: 1 minus the kept mass would be rounding where the tail is small.
    """
    logprobs_CV = logits_CV.to(at_least_float32(logits_CV)).log_softmax(-1)
    k = min(k, logprobs_CV.shape[-1])
    values_CK, ids_CK = logprobs_CV.topk(k, dim=-1)
    rest_CV = logprobs_CV.scatter(-1, ids_CK, -torch.inf)
    tail_C = rest_CV.logsumexp(-1)
    return TopK(ids_CK.cpu().numpy(), values_CK.cpu().numpy(), tail_C.cpu().numpy())


# ---------------------------------------------------------------------------------------------- does it fit


def check_vocabulary(student: Any, teacher: Any, *, student_width: int, teacher_width: int) -> int | None:
    """How many vocabulary entries student and teacher share; None where it is all of both.

    Tokenizers are compared by content (tokens, ids, and the ids they give to probe texts), never by width: models pad
    their vocabularies differently, and equal widths say nothing.

    Args:
        student, teacher: `text.ChatText`, or transformers tokenizers.
        student_width, teacher_width: rows of the output layers.

    Raises:
        ConfigError: the tokenizers differ: logits of one have no meaning for the other.
    """
    from tutelage.text.vocabulary import vocabulary_differences

    ours, theirs = getattr(student, "tokenizer", student), getattr(teacher, "tokenizer", teacher)
    found = vocabulary_differences(ours, theirs)
    if found:
        raise ConfigError(
            f"student and teacher need one tokenizer to compare their next-token distributions; they differ: "
            f"{'; '.join(found)}. Use sequence-level distillation instead: sample answers from the teacher "
            "(tutelage teacher generate) and train on their text with SFT."
        )
    largest = 1 + max(max(t.get_vocab().values()) for t in (ours, theirs))
    shared = min(student_width, teacher_width)
    if shared < min(largest, 1 + max(ours.get_vocab().values())):
        raise ConfigError(
            f"the student's tokenizer has ids up to {max(ours.get_vocab().values())}, but only {shared} entries are "
            f"shared (student {student_width}, teacher {teacher_width} output rows): the teacher is missing tokens "
            "the student can write. Use sequence-level distillation instead."
        )
    return None if student_width == teacher_width else shared


def check_stop_ids(student: Sequence[int], teacher: Sequence[int]) -> None:
    """The token that ends the student's turn must be the one that ends the teacher's.

    A base model that ends with another token than its instruct teacher is graded down for every stop it samples, and
    learns never to stop. That the teacher's generation would stop there too (Qwen2.5's lists both 151645 and 151643)
    does not make it likely.

    Args:
        student, teacher: `ChatText.stop_ids`, where the chat template's own comes first. Further ones may differ.

    Raises:
        ConfigError: the first ones differ.
    """
    if not student or student[0] != next(iter(teacher), None):
        raise ConfigError(
            "student and teacher must end a turn with the same token; the student's template ends it with the first of "
            f"{list(student)}, the teacher's with the first of {list(teacher)}. Graded by this teacher the student "
            "would unlearn to stop. Give the student the teacher's chat template and eos_token_id (and a short SFT on "
            "it), or another teacher."
        )


def load_teacher(
    model: str, *, dtype: str = "bfloat16", device: str = "cpu", quantise: str | None = None, **options: Any
) -> InProcessTeacher:
    """A teacher by path or hub name.

    Args:
        quantise: None, "8bit" or "4bit", as in `load_model`.
        options: those of `InProcessTeacher`.

    Raises:
        ConfigError: the model cannot be loaded. MissingExtra: bitsandbytes is not installed.
    """
    loaded = load_model(model, dtype=dtype, device=device, quantise=quantise)
    return InProcessTeacher(loaded, **{"name": model, **options})
