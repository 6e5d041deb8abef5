"""The errors this package raises on purpose.

TutelageError
  ConfigError       a setting is missing, unknown, out of range, or contradicts another
  DataError         a record, trajectory or file does not say what its type promises
  NumericsError     a number that must be finite, positive or equal is not
  TemplateError     a chat template cannot say who wrote each token
  VerifierError     a verifier is set up wrongly (a failing verdict is never an exception)
  SamplerError      a sampler or a server behind it could not answer
  CheckpointError   saved state is missing, damaged, or belongs to another run
  MissingExtra      an optional package is needed; the message has the command that installs it
  Interrupted       the run was asked to stop, has saved its state, and can be resumed

Every message has four parts: what was needed, what was got, where, and what to do.
"""

from collections.abc import Sequence


class TutelageError(Exception):
    """Catch this to catch everything the package raises on purpose."""

    exit_code = 1
    """What the command line exits with when this reaches it."""


class ConfigError(TutelageError, ValueError):
    """One or more settings are wrong. All of them are listed, not just the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            super().__init__("\n".join(f"  - {p}" for p in self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class DataError(TutelageError, ValueError):
    """A record, trajectory or file breaks the contract of its type."""

    exit_code = 2


class NumericsError(TutelageError, ArithmeticError):
    """A number that must be finite, positive or equal is not."""


class TemplateError(TutelageError, ValueError):
    """A chat template cannot be rendered, or cannot say who wrote each token."""

    exit_code = 2


class VerifierError(TutelageError, ValueError):
    """A verifier is set up wrongly. A verifier that fails on one completion gives an error verdict instead."""

    exit_code = 2


class SamplerError(TutelageError, RuntimeError):
    """A sampler, or the server behind it, could not answer after its retries."""

    def __init__(self, message: str, *, is_everywhere: bool = False) -> None:
        super().__init__(message)
        self.is_everywhere = is_everywhere
        """True where every process of the run raises it."""


class CheckpointError(TutelageError, RuntimeError):
    """Saved state is missing, damaged, or belongs to another run."""


class MissingExtra(TutelageError, ImportError):
    """An optional package is needed; the message has the command that installs it."""

    exit_code = 2


class Interrupted(TutelageError):
    """The run was asked to stop, has saved its state, and can be resumed."""

    exit_code = 130
