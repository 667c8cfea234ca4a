"""Stop at the end of a step: SIGTERM and SIGUSR1 set a flag that the training loop checks."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

EXIT_RESUME = 85
"""Exit code that means: the state is saved; --ckpt.load latest or auto resumes. Not used by shells or sysexits.h."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Context manager; `requested` is the name of the first stop signal since it was entered.

        with StopRequest() as stop:
            for step in ...:
                train(step)
                if stop.requested:
                    save()
                    sys.exit(EXIT_RESUME)

    Enter it after `ray.init`, which installs its own SIGTERM handler, one that ends the process; or `arm` it then, as
    often as that happens, and `release` it at the end. What came in between stays requested. The handlers of before are
    restored at exit. RuntimeError when entered twice or outside of the main thread.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, _Handler] = {}
        self._first: str | None = None
        self._seen: set[int] = set()

    @property
    def requested(self) -> str | None:
        """ "SIGTERM", "SIGUSR1" or None; stays readable after exit."""
        return self._first

    def __enter__(self) -> StopRequest:
        if self._previous:
            raise RuntimeError("this StopRequest is in use already")
        self._first = None
        self._seen.clear()
        self.arm()
        return self

    def arm(self) -> None:
        """Install the handlers, also in the place of those that were installed since the last time."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("stop signals can only be handled in the main thread; enter StopRequest there")
        for number in STOP_SIGNALS:
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def release(self) -> None:
        for number, previous in self._previous.items():
            # A handler that was installed meanwhile stays. None: the earlier handler was not installed from Python.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """May run between any two instructions of the main thread, so it only sets the flag and logs."""
        name = signal.Signals(number).name
        if number in self._seen:
            logger.warning("%s once more: ignored, already stopping at the end of this step", name)
            return
        self._seen.add(number)
        if self._first is None:
            self._first = name
        logger.warning("%s: saving at the end of this step, then exiting with code %d", name, EXIT_RESUME)
