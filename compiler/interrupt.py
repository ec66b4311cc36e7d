"""Ctrl-C and SIGTERM while TVM runs: what was begun is cleaned up, then the process ends.

TVM's callbacks turn an exception of a signal handler into an error without a message, so what
follows a signal is raised anew as the signal's own exception.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM  # as shells have it

# Signal -> the handler a program has that does nothing about it, and what is raised instead.
_SIGNALS: dict[signal.Signals, tuple[object, Callable[[], BaseException]]] = {
    signal.SIGINT: (signal.default_int_handler, KeyboardInterrupt),
    signal.SIGTERM: (signal.SIG_DFL, lambda: SystemExit(EXIT_TERMINATED)),
}


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt in place of any error that follows a SIGINT, and SystemExit with
    code 143 in place of SIGTERM's sudden end and any error that follows it.

    Does nothing outside the main thread, and for a signal that the program handles by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[signal.Signals] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise _SIGNALS[received[-1]][1]()

    usual = {s: signal.getsignal(s) for s, (default, _) in _SIGNALS.items()}
    ours = [s for s, (default, _) in _SIGNALS.items() if usual[s] is default]
    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield
    except Exception as exc:
        if received:
            raise _SIGNALS[received[0]][1]() from exc
        raise
    finally:
        for number in ours:
            signal.signal(number, usual[number])
