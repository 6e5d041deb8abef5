"""Task sets: what a model is asked and what a verifier needs to judge the answer.

Every loader returns `Loaded(tasks, problems)`: records that cannot be used are not dropped but listed with where they
stand and why.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tutelage.errors import ConfigError, DataError, MissingExtra
from tutelage.types import Message, Task, content_hash, seed_for

Canonical = Callable[[Mapping[str, Any]], str]
"""A record (`question`, `answer`, `metadata`) -> what no two records on different sides of a split may share."""

_CHUNK = 1024  # part of what "equal seed, equal tasks" means: some generators depend on their size
_QUESTION = "{question}"


class Problem(NamedTuple):
    """A record that could not be used."""

    origin: str
    """`file:line`, or which generated item."""
    reason: str


class Loaded(NamedTuple):
    """A task set and what was left out of it."""

    tasks: list[Task]
    problems: list[Problem]


def gsm8k(path: Path | str, *, split: str = "train", system: str | None = None, prompt: str = _QUESTION) -> Loaded:
    """GSM8K (arXiv:2110.14168): `question`, and `answer` whose gold number follows `####`.

    Args:
        path: the folder with `train.jsonl` and `test.jsonl`, or one file.
        split: which file of the folder.
        system: a system message before the question.
        prompt: the user message, with `{question}` in it.

    The gold solution is kept in `metadata["solution"]`, with the calculator's `<<…>>` notes removed.
    """

    def read(record: Mapping[str, Any], line: int) -> Task:
        question, answer = _text(record, "question"), _text(record, "answer")
        solution, mark, gold = answer.rpartition("####")
        if not mark or not gold.strip():
            raise DataError('field "answer" must end with "#### <number>"')
        return Task(
            id=f"gsm8k-{split}-{line}",
            messages=_messages(question, system, prompt),
            answer=gold.strip().replace(",", ""),
            name="gsm8k",
            metadata={"solution": re.sub(r"<<[^<>]*>>", "", solution).strip()},
        )

    return _load(_file(path, f"{split}.jsonl"), read)


def math500(path: Path | str, *, system: str | None = None, prompt: str = _QUESTION) -> Loaded:
    """MATH-500 (arXiv:2305.20050): `problem`, LaTeX `answer`, `subject`, `level`, `unique_id`.

    `path` is the folder with `test.jsonl`, or the file. Subject, level and solution are kept in the metadata.
    """

    def read(record: Mapping[str, Any], line: int) -> Task:
        return Task(
            id=str(record.get("unique_id") or f"math500-{line}"),
            messages=_messages(_text(record, "problem"), system, prompt),
            answer=_text(record, "answer"),
            name="math500",
            metadata={k: record[k] for k in ("subject", "level", "solution") if k in record},
        )

    return _load(_file(path, "test.jsonl"), read)


def jsonl(
    path: Path | str,
    *,
    question: str = "prompt",
    messages: str = "messages",
    answer: str = "answer",
    id: str = "id",
    name: str = "default",
    system: str | None = None,
    prompt: str = _QUESTION,
) -> Loaded:
    """Tasks from JSON lines: a prompt or chat messages, and usually a gold answer.

    Args:
        path: the file.
        question: field with the prompt as text.
        messages: field with the prompt as chat messages, used where a record has it. It must end before the
            assistant's turn.
        answer: field with the gold answer, a text or a number; a record without it gets None.
        id: field with the record's id; a record without it is named by its line.
        name: the task family, where the record's own `name` does not say.
        system: a system message before prompts given as text.
        prompt: the user message, with `{question}` in it, for prompts given as text.

    All other fields are kept in the metadata.
    """

    def read(record: Mapping[str, Any], line: int) -> Task:
        gold = record.get(answer)
        if gold is not None and (isinstance(gold, bool) or not isinstance(gold, (str, int, float))):
            raise DataError(f'field "{answer}" must be a text or a number, got {type(gold).__name__}')
        if messages in record:
            asked = _check_messages(record[messages], messages)
        else:
            asked = _messages(_text(record, question), system, prompt)
        rest = {k: v for k, v in record.items() if k not in (question, messages, answer, id, "name", "tools")}
        return Task(
            id=str(record.get(id, f"{Path(path).stem}-{line}")),
            messages=asked,
            answer=None if gold is None else str(gold),
            name=str(record.get("name", name)),
            metadata=rest,
            tools=tuple(record.get("tools") or ()),
        )

    return _load(_file(path, None), read)


def without_overlap(train: Iterable[Task], heldout: Iterable[Task]) -> Loaded:
    """The training tasks whose question is not held out, letter case and spacing aside; the others as problems."""
    taken = {_asked(t): t.id for t in heldout}
    kept, problems = [], []
    for task in train:
        if (twin := taken.get(_asked(task))) is None:
            kept.append(task)
        else:
            problems.append(Problem(task.id, f"asks the same as held-out task {twin!r}"))
    return Loaded(kept, problems)


def _asked(task: Task) -> str:
    return " ".join(json.dumps([dict(m) for m in task.messages], ensure_ascii=False).casefold().split())


# -- reasoning-gym ----------------------------------------------------------------------------------------------------


def same_question(record: Mapping[str, Any]) -> str:
    """The question, letter case and spacing aside."""
    return " ".join(str(record["question"]).casefold().split())


def commutative_terms(record: Mapping[str, Any]) -> str:
    """The expression, its terms and operators sorted: `3 + 4` is `4 + 3`, and `3 - 4` is `4 - 3`.

    Raises:
        DataError: the record has no `metadata["expression"]`.
    """
    expression = (record.get("metadata") or {}).get("expression")
    if not isinstance(expression, str):
        raise DataError('canonical "commutative_terms" needs metadata["expression"], which this task does not have')
    parts = expression.split()
    return " ".join([*sorted(parts[0::2]), *sorted(parts[1::2])])


CANONICAL: dict[str, Canonical] = {"question": same_question, "commutative_terms": commutative_terms}


@dataclass(frozen=True, slots=True)
class _Item:
    record: dict[str, Any]
    canonical: str
    seed: int
    index: int


def reasoning_gym_tasks(
    name: str,
    size: int | None,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    split: str = "train",
    heldout: int = 0,
    canonical: str | Canonical = "question",
    system: str | None = None,
    prompt: str = _QUESTION,
) -> Loaded:
    """Distinct tasks of one reasoning-gym generator, on one side of a split that no question crosses.

    The package makes item i of seed s from `Random(s + i)`, so nearby seeds share almost all their items. Here the
    sides are made from one stream instead: the held-out questions are chosen first, and no question that is
    `canonical`ly equal to one of them is trained on. They depend on `name`, `config`, `seed`, `heldout` and `canonical`
    only, so any `size` and any two calls fit together. A generator that runs out of questions (found by drawing) is
    enumerated, and both sides share all of them.

    Args:
        name: the generator, for example "chain_sum".
        size: how many tasks of this side; None for all there are, where they run out, and for `heldout`.
        config: the generator's own settings; not `seed` or `size`.
        seed: equal seeds give equal tasks.
        split: "train" or "heldout".
        heldout: how many questions are held out.
        canonical: "question", "commutative_terms", or a function of the record.
        system: a system message before the question.
        prompt: the user message, with `{question}` in it.

    Returns:
        Tasks whose `metadata["reasoning_gym"]` lets `verifiers.GymVerifier` rebuild the grader.

    Raises:
        ConfigError: an unknown generator or setting.
        DataError: there are fewer distinct questions than asked for; says how many.
        MissingExtra: reasoning-gym is not installed.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f'split must be "train" or "heldout", got {split!r}')
    if heldout < 0 or (size is not None and size < 1) or (split == "heldout" and heldout < 1):
        raise ConfigError(f"reasoning-gym {name}: need size >= 1 and heldout >= 0, got size={size}, heldout={heldout}")
    stream = _Stream(name, dict(config or {}), seed, _canonical(canonical))
    sides = _Sides(stream, heldout)
    chosen = sides.train(size) if split == "train" else sides.heldout[:size]
    if size is not None and len(chosen) < size:
        raise DataError(
            f"reasoning-gym {name} with {dict(config or {})} has {stream.num_distinct} distinct questions; with "
            f"{len(sides.heldout)} held out there are {len(chosen)} for {split}, and size={size} was asked for. Lower "
            "size or heldout, or make the generator's settings wider"
        )
    return Loaded([_gym_task(stream, item, system, prompt) for item in chosen], [])


def _canonical(canonical: str | Canonical) -> Canonical:
    if callable(canonical):
        return canonical
    if canonical not in CANONICAL:
        raise ConfigError(f"canonical must be one of {', '.join(CANONICAL)} or a function, got {canonical!r}")
    return CANONICAL[canonical]


class _Stream:
    """Distinct questions of a generator in a fixed order, remembered as they are drawn."""

    def __init__(self, name: str, config: dict[str, Any], seed: int, canonical: Canonical) -> None:
        self.name, self.config, self.canonical = name, config, canonical
        self.items: list[_Item] = []
        self.num_draws = 0
        self.num_idle = 0
        self._seen: set[str] = set()
        # Seeds are spread so far apart that the items of two of them never meet.
        self._seed = seed_for("reasoning-gym", name, seed) % 2**31
        self._draws = self._draw()
        self._create = _gym_factory(name, config)

    @property
    def num_distinct(self) -> int:
        return len(self.items)

    @property
    def is_exhausted(self) -> bool:
        """True once so many draws in a row brought nothing new that a question is unlikely to be missing."""
        return self.num_idle > 10 * self.num_distinct + 200

    def more(self) -> bool:
        """Draw until one more distinct question is found; False where there is none."""
        while not self.is_exhausted:
            item = next(self._draws)
            self.num_draws += 1
            question = same_question(item.record)
            if question not in self._seen:
                self._seen.add(question)
                self.items.append(item)
                self.num_idle = 0
                return True
            self.num_idle += 1
        return False

    def _draw(self) -> Iterator[_Item]:
        chunk = 0
        while True:
            seed = (self._seed + chunk * _CHUNK) % 2**32
            dataset = self._create(seed)
            order = list(range(_CHUNK))
            Random(seed).shuffle(order)  # some generators sort their items by kind
            for index in order:
                record = dataset[index]
                yield _Item(record, self.canonical(record), seed, index)
            chunk += 1


class _Sides:
    """The split of a stream. What is held out does not depend on how much is trained on."""

    def __init__(self, stream: _Stream, num_heldout: int) -> None:
        self.stream = stream
        is_small = num_heldout > 0 and self._looks_small(num_heldout)
        if is_small:
            while stream.more():
                pass
            self.heldout = self._whole_classes(num_heldout)
        else:
            self.heldout = stream.items[:num_heldout]
        if len(self.heldout) < num_heldout:
            raise DataError(
                f"reasoning-gym {stream.name} with {stream.config} has {stream.num_distinct} distinct questions, of "
                f"which {len(self.heldout)} can be held out, and heldout={num_heldout} was asked for. Lower heldout"
            )
        self.classes = {item.canonical for item in self.heldout}

    def _looks_small(self, num_heldout: int) -> bool:
        """True where a tenth of 2 * num_heldout + 50 draws repeat: under about 10 * num_heldout + 250 questions.

        Small sets are enumerated, so that classes can be held out whole. In large ones what is lost to neither side
        does not matter.
        """
        stream, num_probes = self.stream, 2 * num_heldout + 50
        while stream.num_draws < num_probes or stream.num_distinct < num_heldout:
            if not stream.more():
                return True
        return stream.num_draws - stream.num_distinct >= 0.1 * stream.num_draws

    def _whole_classes(self, num_heldout: int) -> list[_Item]:
        """Exactly `num_heldout` questions in classes that are complete, so that none is lost to both sides."""
        classes: dict[str, list[_Item]] = {}
        for item in self.stream.items:
            classes.setdefault(item.canonical, []).append(item)
        chosen: list[_Item] = []
        for members in classes.values():
            if len(chosen) + len(members) <= num_heldout:
                chosen += members
        return chosen

    def train(self, size: int | None) -> list[_Item]:
        chosen: list[_Item] = []
        start = 0
        while size is None or len(chosen) < size:
            if start == self.stream.num_distinct and not self._more(size):
                break
            item = self.stream.items[start]
            start += 1
            if item.canonical not in self.classes:
                chosen.append(item)
        return chosen

    def _more(self, size: int | None) -> bool:
        if size is None and self.stream.num_distinct >= 100_000:
            raise DataError(
                f"reasoning-gym {self.stream.name} has more than {self.stream.num_distinct} distinct questions: "
                "give a size"
            )
        return self.stream.more()


def _gym_factory(name: str, config: dict[str, Any]) -> Callable[[int], Any]:
    """`seed -> dataset` of one chunk, with the settings checked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a dependency compares strings by `is`
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError as e:
        raise MissingExtra("reasoning-gym tasks need the package reasoning-gym: pip install 'tutelage[gym]'") from e
    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"reasoning-gym has no task {name!r}{hint}")
    if clash := {"seed", "size"} & set(config):
        raise ConfigError(f"reasoning-gym {name}: {', '.join(sorted(clash))} must not be in config: give it beside it")

    def create(seed: int) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # a dependency leaves its data file open
                return reasoning_gym.create_dataset(name, seed=seed, size=_CHUNK, **config)
        except (TypeError, ValueError, AssertionError) as e:
            raise ConfigError(f"reasoning-gym {name} does not take the settings {config}: {e}") from e

    create(0)
    return create


def _gym_task(stream: _Stream, item: _Item, system: str | None, prompt: str) -> Task:
    record = {**item.record, "metadata": {k: v for k, v in item.record["metadata"].items() if k != "difficulty"}}
    gym: dict[str, Any] = {"name": stream.name, "config": stream.config}
    if _survives_json(record):  # without the generator's ranges, which no grader reads
        gym["entry"] = record
    else:  # the worker makes it again: JSON would turn its tuples into lists, and its grader compares them
        gym |= {"seed": item.seed, "size": _CHUNK, "index": item.index}
    answer = record["answer"]
    return Task(
        id=f"{stream.name}-{content_hash(stream.config, record['question'])}",
        messages=_messages(record["question"], system, prompt),
        answer=answer if isinstance(answer, str) else None,
        name=stream.name,
        metadata={"reasoning_gym": gym, "canonical": item.canonical},
    )


def _survives_json(record: Any) -> bool:
    try:
        return bool(_same(json.loads(json.dumps(record, allow_nan=False)), record))
    except (TypeError, ValueError, RecursionError):
        return False


def _same(a: Any, b: Any) -> bool:
    """Equal in value and type all the way down: 1 is not True, and a list is not a tuple."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# -- files ------------------------------------------------------------------------------------------------------------


def _file(path: Path | str, inside: str | None) -> Path:
    path = Path(path)
    if inside is not None and path.is_dir():
        path = path / inside
    if not path.is_file():
        raise DataError(f"a task file is needed at {path}, and there is none. Check the path")
    return path


def _load(path: Path, read: Callable[[Mapping[str, Any], int], Task]) -> Loaded:
    """Read every line; a second record that asks the same, or has the same id, is a problem too."""
    tasks: list[Task] = []
    problems: list[Problem] = []
    asked: dict[str, int] = {}
    ids: dict[str, int] = {}
    with path.open("rb") as f:
        for line, raw in enumerate(f, 1):
            if not raw.strip():
                continue
            try:
                task = read(_record(raw), line)
                if (twin := asked.get(task.hash)) is not None:
                    raise DataError(f"asks the same as line {twin}")
                if (twin := ids.get(task.id)) is not None:
                    raise DataError(f"has the same id {task.id!r} as line {twin}")
            except DataError as e:
                problems.append(Problem(f"{path.name}:{line}", str(e)))
                continue
            asked[task.hash] = ids[task.id] = line
            tasks.append(replace(task, metadata={**task.metadata, "origin": f"{path.name}:{line}"}))
    if not tasks:
        first = f"; the first of {len(problems)} problems: {': '.join(problems[0])}" if problems else ": it is empty"
        raise DataError(f"{path} holds no usable task{first}")
    return Loaded(tasks, problems)


def _record(raw: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise DataError(f"is not UTF-8: {e.reason} at byte {e.start}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"is not JSON: {e}") from e
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, got {type(record).__name__}")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        got = "nothing" if value is None else "an empty text" if isinstance(value, str) else type(value).__name__
        raise DataError(f'field "{field}" must be a text, got {got}; the record has {sorted(record)}')
    return value


def _messages(question: str, system: str | None, prompt: str) -> tuple[Message, ...]:
    if _QUESTION not in prompt:
        raise ConfigError(f'prompt must hold "{_QUESTION}", got {prompt!r}')
    user = {"role": "user", "content": prompt.replace(_QUESTION, question)}
    return ({"role": "system", "content": system}, user) if system else (user,)


def _check_messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'field "{field}" must be a list of chat messages, got {type(value).__name__}')
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f'field "{field}": message {i} must be an object with role and content')
    if value[-1]["role"] == "assistant":
        raise DataError(f'field "{field}" must end before the assistant\'s turn, and ends with it')
    return tuple(value)
