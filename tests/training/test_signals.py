"""Stop requests: the first signal asks, a second SIGINT breaks off, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from glam_ext.training.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # again: still only a request
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_second_interrupt_breaks_off():
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_another_thread_may_train_without_handlers():
    before = [signal.getsignal(n) for n in SIGNALS]
    seen = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append([signal.getsignal(n) for n in SIGNALS])
            stop.request("test")
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, True]
