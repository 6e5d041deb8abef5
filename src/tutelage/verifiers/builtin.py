"""The verifiers: exact, regex, last number, flag, math-verify, reasoning-gym, and a user's own function.

All of them give accept, reject or error; none raises on what a model wrote. Judging happens in the worker processes of
`pool.WorkerPool`.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tutelage.errors import ConfigError, MissingExtra, VerifierError
from tutelage.types import Status, Task, Trajectory, Verdict, content_hash
from tutelage.verifiers import judges
from tutelage.verifiers.judges.gym import REFUSED
from tutelage.verifiers.judges.text import EXTRACTORS, after_thinking, flag_problem, last_number, normalise
from tutelage.verifiers.locate import locate_function
from tutelage.verifiers.pool import Limits, Outcome, WorkerPool


class PooledVerifier:
    """What the verifiers share: rules before judging, the worker pool, verdicts in order.

    Before a judge sees a completion: one that is cut off by the length limit is rejected as "truncated", even where it
    already holds the answer (its author had not ended it); an empty one is rejected as "empty"; and of one that thinks
    aloud in `<think>` only what follows `</think>` is judged.
    """

    kind = ""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        workers: int | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        retries: int = 1,
        reject_truncated: bool = True,
        strip_thinking: bool = True,
        in_process: bool = False,
        pass_env: Sequence[str] = (),
        sys_path: Sequence[str] | None = None,
        name: str | None = None,
        version: str = "1",
    ) -> None:
        """Set up; no process is started before the first verdict.

        Args:
            options: what the judge is built with.
            workers: worker processes; None for one a core, at most 8.
            limits: what one verdict may use.
            retries: further tries after a worker was killed from outside.
            reject_truncated: reject completions whose `finish` is "length".
            strip_thinking: judge only what follows `</think>`; thinking that never ends is rejected.
            in_process: judge here and not in a worker. Only for judges whose time is linear in the text.
            pass_env, sys_path: see `WorkerPool`.
            name: goes into the verdicts; None for the kind.
            version: of the judge; the options are hashed onto it.
        """
        self.name = name or self.kind
        self.version = f"{version}-{content_hash(dict(options), reject_truncated, strip_thinking)[:8]}"
        self.reject_truncated, self.strip_thinking = reject_truncated, strip_thinking
        self._in_process = judges.build(self.kind, options) if in_process else None
        self.pool = WorkerPool(
            self.kind,
            options,
            workers=workers,
            limits=Limits(**limits) if isinstance(limits, Mapping) else limits,
            retries=retries,
            pass_env=pass_env,
            sys_path=sys_path,
        )

    def judge(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory of one task, in order."""
        return self.judge_many([(task, trajectories)])[0]

    def judge_many(self, groups: Sequence[tuple[Task, Sequence[Trajectory]]]) -> list[list[Verdict]]:
        """`judge` for many tasks at once: all verdicts are spread over the workers together."""
        verdicts: list[list[Verdict | None]] = []
        payloads, places = [], []
        for g, (task, trajectories) in enumerate(groups):
            verdicts.append([])
            for t, trajectory in enumerate(trajectories):
                text = self._readable(trajectory)
                if isinstance(text, Verdict):
                    verdicts[g].append(text)
                    continue
                verdicts[g].append(None)
                payloads.append(self.payload(task, trajectory, text))
                places.append((g, t))
        for (g, t), outcome in zip(places, self._outcomes(payloads), strict=True):
            verdicts[g][t] = self._verdict(outcome.status, outcome.reason, outcome.score, outcome.key)
        return [[v for v in row if v is not None] for row in verdicts]

    def problem(self, task: Task) -> str | None:
        """Why no answer to this task could be judged, or None."""
        return None if task.answer is not None and task.answer.strip() else "it has no gold answer"

    def check(self, tasks: Iterable[Task]) -> None:
        """Look at the tasks before anything is sampled for them.

        Raises:
            VerifierError: every verdict on some of them would be an error; says how many and why.
        """
        found = [(t.id, p) for t in tasks if (p := self.problem(t)) is not None]
        if found:
            raise VerifierError(
                f"verifier {self.name!r} cannot judge {len(found)} of the tasks; the first is {found[0][0]!r}: "
                f"{found[0][1]}. Remove these tasks or use another verifier for them"
            )

    def payload(self, task: Task, trajectory: Trajectory, text: str) -> dict[str, Any]:
        """What the judge gets to see."""
        return {"gold": task.answer, "completion": text}

    def close(self) -> None:
        """End the workers. A later verdict starts new ones."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def is_empty(self, trajectory: Trajectory) -> bool:
        return not normalise(trajectory.completion)

    def _readable(self, trajectory: Trajectory) -> str | Verdict:
        """The text to judge, or the verdict where there is nothing to judge."""
        if self.reject_truncated and trajectory.is_truncated:
            return self._verdict("reject", "truncated", 0.0)
        if self.is_empty(trajectory):
            return self._verdict("reject", "empty", 0.0)
        if not self.strip_thinking or not trajectory.completion:
            return trajectory.completion
        text = after_thinking(trajectory.completion)
        if text is None:
            return self._verdict("reject", "thinking that never ends", 0.0)
        return text if normalise(text) else self._verdict("reject", "nothing after the thinking", 0.0)

    def _outcomes(self, payloads: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        if self._in_process is None:
            return self.pool.run(payloads)
        return [Outcome(**self._in_process.judge(p)) for p in payloads]

    def _verdict(self, status: str, reason: str, score: float | None, key: str | None = None) -> Verdict:
        return Verdict(
            status=Status(status), score=score, reason=reason, verifier=self.name, version=self.version, key=key
        )


def _check_extract(extract: str) -> None:
    if extract not in EXTRACTORS:
        raise ConfigError(f"extract must be one of {', '.join(EXTRACTORS)}, got {extract!r}")


def _check_wrapper(wrapper: Sequence[str] | None) -> list[str] | None:
    if wrapper is None:
        return None
    if isinstance(wrapper, str) or len(wrapper) != 2 or not all(isinstance(w, str) for w in wrapper):
        raise ConfigError(f'wrapper must be a prefix and a suffix, for example ["\\\\boxed{{", "}}"], got {wrapper!r}')
    return list(wrapper)


class ExactVerifier(PooledVerifier):
    """The answer equals the gold answer, character by character.

    Both are put in Unicode's NFC, freed of zero-width characters and outer whitespace, freed of one layer of `wrapper`
    where they have it, and with `casefold` of case. `extract` says which part of the completion is the answer: "whole",
    "last_line", "last_number" or "answer_tag".
    """

    kind = "exact"

    def __init__(
        self, *, casefold: bool = False, wrapper: Sequence[str] | None = None, extract: str = "whole", **common: Any
    ) -> None:
        _check_extract(extract)
        super().__init__({"casefold": casefold, "wrapper": _check_wrapper(wrapper), "extract": extract}, **common)


class RegexVerifier(PooledVerifier):
    """The last match of `pattern` holds the gold answer.

    Its group named `answer`, else its first group, else the whole match is compared, as text or with `numeric` as a
    number. A task without a gold answer accepts any match. A pattern that backtracks for ever ends at the time limit
    as an error verdict.
    """

    kind = "regex"

    def __init__(self, *, pattern: str, casefold: bool = False, numeric: bool = False, **common: Any) -> None:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {e}") from e
        if common.get("in_process"):
            raise ConfigError("regex cannot be judged in_process: a pattern may run for ever; remove in_process")
        super().__init__({"pattern": pattern, "casefold": casefold, "numeric": numeric}, **common)

    def problem(self, task: Task) -> str | None:
        return None


class LastNumberVerifier(PooledVerifier):
    """The last number of the completion equals the last number of the gold answer, exactly.

    `1,234.0` is `1234`; `7.`, `$7` and `7 apples` are 7; `50%` is 50; `1/2` is 0.5; `5-3` holds 5 and 3. A decimal
    comma, numbers in words and digits other than 0-9 are not read. The verdict's key is the list of calculations in the
    text.
    """

    kind = "last_number"

    def __init__(self, **common: Any) -> None:
        super().__init__({}, **common)

    def problem(self, task: Task) -> str | None:
        has_number = task.answer is not None and last_number(task.answer) is not None
        return None if has_number else f"its gold answer {task.answer!r:.60} holds no number"


class FlagVerifier(PooledVerifier):
    """The submitted answer is the flag: the gold answer, or what its `sha256:…` is the hash of.

    The submission is `trajectory.extra["submission"]` (a text, or a list of which the last counts), else what `extract`
    takes from the completion. A flag that is only mentioned is rejected, one that stands in the prompt is rejected, and
    a placeholder for a flag (`flag{...}`, `fake_flag`) is an error verdict.
    """

    kind = "flag"

    def __init__(
        self,
        *,
        wrapper: Sequence[str] | None = None,
        casefold: bool = False,
        extract: str = "whole",
        max_attempts: int | None = None,
        **common: Any,
    ) -> None:
        """`max_attempts`: a list of more submissions than this is rejected."""
        _check_extract(extract)
        self.max_attempts = max_attempts
        options = {"wrapper": _check_wrapper(wrapper), "casefold": casefold, "extract": extract}
        if common.get("in_process"):
            raise ConfigError("flag cannot be judged in_process; remove in_process")
        super().__init__(options, **common)

    def _readable(self, trajectory: Trajectory) -> str | Verdict:
        submissions = self._submissions(trajectory)
        if self.max_attempts is not None and len(submissions) > self.max_attempts:
            return self._verdict("reject", f"{len(submissions)} submissions where {self.max_attempts} are allowed", 0.0)
        return super()._readable(trajectory)

    def problem(self, task: Task) -> str | None:
        return flag_problem(task.answer, self.pool.options["wrapper"])

    def is_empty(self, trajectory: Trajectory) -> bool:
        return not self._submissions(trajectory) and super().is_empty(trajectory)

    def payload(self, task: Task, trajectory: Trajectory, text: str) -> dict[str, Any]:
        prompt = "\n".join(_texts(task.messages))
        submissions = self._submissions(trajectory)
        last = submissions[-1] if submissions else None
        return {**super().payload(task, trajectory, text), "prompt": prompt, "submission": last}

    @staticmethod
    def _submissions(trajectory: Trajectory) -> list[str]:
        given = trajectory.extra.get("submission")
        if given is None:
            return []
        return [str(s) for s in given] if isinstance(given, (list, tuple)) else [str(given)]


def _texts(value: Any) -> list[str]:
    """Every text in nested messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _texts(v)]
    return [t for v in value for t in _texts(v)] if isinstance(value, (list, tuple)) else []


def _version_of(module: str, package: str, extra: str, what: str) -> str:
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{what} needs the package {package}: pip install 'tutelage[{extra}]'")
    return importlib.metadata.version(package)


class MathVerifier(PooledVerifier):
    """Mathematical equality by math-verify: numbers, fractions, expressions, sets, intervals.

    The last `\\boxed{…}` is the answer; without one, what math-verify finds in the text, which favours the last
    expression (`require_box=True` rejects instead). An unevaluated `\\boxed{48/2+48}` equals 72.
    """

    kind = "math_verify"

    def __init__(self, *, require_box: bool = False, precision: int = 6, **common: Any) -> None:
        """`precision`: decimal places to which floating-point numbers are compared."""
        version = _version_of("math_verify", "math-verify", "math", "verifier math_verify")
        if common.get("in_process"):
            raise ConfigError("math_verify cannot be judged in_process: it can hang; remove in_process")
        super().__init__({"require_box": require_box, "precision": precision}, version=f"1-{version}", **common)


class GymVerifier(PooledVerifier):
    """The task's own grader of reasoning-gym gives at least `threshold`.

    Tasks carry `metadata["reasoning_gym"]`, see `data.tasks.reasoning_gym_tasks`. Several graders evaluate the answer
    as Python: those see only literals and arithmetic, in a process of their own. Tasks whose grader accepts what is no
    answer are refused.
    """

    kind = "reasoning_gym"

    def __init__(self, *, threshold: float = 1.0, extract: str = "whole", key: str = "auto", **common: Any) -> None:
        """Further settings.

        Args:
            threshold: graders pay up to just under 1 for an answer that contains the right one.
            extract: "whole", "last_line", "last_number" or "answer_tag": what of the completion the grader sees.
            key: what makes two solutions different: "text", "answer", or "auto": the answer for tasks with several.
        """
        _check_extract(extract)
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
        if key not in ("auto", "text", "answer"):
            raise ConfigError(f"key must be auto, text or answer, got {key!r}")
        version = _version_of("reasoning_gym", "reasoning-gym", "gym", "verifier reasoning_gym")
        if common.get("in_process"):
            raise ConfigError("reasoning_gym cannot be judged in_process: it evaluates text; remove in_process")
        options = {"threshold": threshold, "extract": extract, "key": key}
        super().__init__(options, version=f"1-{version}", **common)

    def problem(self, task: Task) -> str | None:
        gym = task.metadata.get("reasoning_gym")
        if not isinstance(gym, Mapping) or "name" not in gym:
            return 'it has no metadata["reasoning_gym"]; load it with data.tasks.reasoning_gym_tasks'
        return f"{gym['name']} is refused: {REFUSED[gym['name']]}" if gym["name"] in REFUSED else None

    def payload(self, task: Task, trajectory: Trajectory, text: str) -> dict[str, Any]:
        return {"completion": text, "gym": task.metadata.get("reasoning_gym")}


class PythonVerifier(PooledVerifier):
    """A user's own function: `function(task: dict, completion: str, trajectory: dict)`.

    It returns a bool, a number in [0, 1] (accepted from `threshold`), or a dict with `accepted` or `status`, and
    optionally `score`, `reason`, `key`. It gets the completion whole, thinking included. Every verdict has a process
    and an empty working folder of its own (`isolate=False` shares one process, for functions that keep something
    between calls).

    The code is imported in the workers only, never here.
    """

    kind = "python"

    def __init__(
        self,
        *,
        function: str,
        root: str | Path | None = None,
        allow_outside_code: bool = False,
        threshold: float = 1.0,
        isolate: bool = True,
        **common: Any,
    ) -> None:
        """Find the function's file without running it.

        Args:
            function: `module:function` or `path.py:function`.
            root: the project's or configuration's folder, None for the current one. Paths are relative to it.
            allow_outside_code: run code from outside `root` too.
            threshold: the score from which a number is an acceptance.
            isolate: a process for each verdict.

        Raises:
            ConfigError: the function is not found, or lies outside `root` and that is not allowed.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
        if common.get("in_process"):
            raise ConfigError("python cannot be judged in_process: it may do anything; remove in_process")
        base = Path(root or ".").resolve()
        found = locate_function(function, base, allow_outside=allow_outside_code)
        self.file = found.file
        code = hashlib.sha256(found.file.read_bytes()).hexdigest()[:12]
        options = {"target": found.target, "threshold": threshold, "isolate": isolate}
        super().__init__(
            options,
            **{
                "version": f"1-{code}",
                "name": f"python:{function}",
                "strip_thinking": False,
                "sys_path": found.sys_path,
                **common,
            },
        )

    def problem(self, task: Task) -> str | None:
        return None  # what the function needs is its own business

    def is_empty(self, trajectory: Trajectory) -> bool:
        """An agent's turn may be nothing but tool calls."""
        calls = any(m.get("tool_calls") for m in trajectory.messages if m.get("role") == "assistant")
        return not calls and super().is_empty(trajectory)

    def payload(self, task: Task, trajectory: Trajectory, text: str) -> dict[str, Any]:
        asked = {
            "id": task.id,
            "name": task.name,
            "messages": [dict(m) for m in task.messages],
            "answer": task.answer,
            "metadata": dict(task.metadata),
        }
        done = {
            "id": trajectory.id,
            "messages": [dict(m) for m in trajectory.messages],
            "completion": text,
            "finish": trajectory.finish,
            "sample_index": trajectory.sample_index,
            "extra": dict(trajectory.extra),
        }
        return {"task": asked, "completion": text, "trajectory": done}


KINDS: dict[str, Callable[..., PooledVerifier]] = {
    "exact": ExactVerifier,
    "regex": RegexVerifier,
    "last_number": LastNumberVerifier,
    "flag": FlagVerifier,
    "math_verify": MathVerifier,
    "reasoning_gym": GymVerifier,
    "python": PythonVerifier,
}
