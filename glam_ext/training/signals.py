"""SIGTERM and SIGINT as a request: the loop asks between steps, saves and leaves. A second SIGINT breaks off."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, run the same command again to go on."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager; inside, `requested` tells whether one of the signals came. Old handlers come back at the end.

    Python runs handlers in the main thread only; elsewhere this does nothing and `request` is the only way to stop.
    """

    def __init__(self) -> None:
        self._name = ""
        self._old: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self._name)

    @property
    def name(self) -> str:
        """Of the signal that came, "" if none."""
        return self._name

    def request(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
