"""Being asked to stop: SIGTERM and Ctrl-C end the step in hand, save, and leave a run that can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tutelage.errors import Interrupted
from tutelage.types import Progress


class StopRequest:
    """Set by a signal, asked between pieces of work."""

    def __init__(self) -> None:
        self.is_set = False
        self.reason = ""

    def request(self, reason: str) -> None:
        self.is_set, self.reason = True, reason

    @contextmanager
    def handling_signals(self) -> Iterator["StopRequest"]:
        """Turn SIGTERM and SIGINT into a request; a second SIGINT interrupts at once. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self.is_set and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.request(signal.Signals(number).name)

        before = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StoppableProgress:
    """A progress that ends sampling or judging when a stop is requested: chunks in hand are redone on resume."""

    def __init__(self, inner: Progress, stop: StopRequest) -> None:
        self.inner, self.stop = inner, stop

    def start(self, what: str, total: int, unit: str) -> None:
        self.inner.start(what, total, unit)

    def advance(self, amount: int = 1, **numbers: float) -> None:
        self.inner.advance(amount, **numbers)
        if self.stop.is_set:
            raise Interrupted(f"stopped by {self.stop.reason} while drawing: finished chunks are kept")

    def finish(self) -> None:
        self.inner.finish()


class Quiet:
    """Progress that shows nothing."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Nothing to show."""

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Nothing to show."""

    def finish(self) -> None:
        """Nothing to show."""
