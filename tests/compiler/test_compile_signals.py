"""Signals in the middle of a compile: the folder vanishes, whatever the signal was turned into."""

import os
import signal
import threading

import pytest

from llmc.compiler.interrupt import interruptible
from llmc.compiler.new_folder import new_folder

SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Those of a fresh Python process, and afterwards those there were."""
    before = {s: signal.getsignal(s) for s, _ in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "raised"), SIGNALS)
def test_a_signal_leaves_no_folder_and_the_usual_handlers(tmp_path, number, raised):
    def compile_():
        with interruptible(), new_folder(tmp_path / "art", force=False) as folder:
            (folder / "model.so").write_text("half")
            send(number)

    before = signal.getsignal(number)
    with pytest.raises(raised):
        compile_()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "raised"), SIGNALS)
def test_an_error_that_swallowed_a_signal_becomes_the_signal_again(number, raised):
    """As TVM's callbacks do."""

    def swallow():
        try:
            send(number)
        except BaseException:
            raise RuntimeError("") from None

    with pytest.raises(raised) as found, interruptible():
        swallow()
    assert isinstance(found.value.__cause__, RuntimeError)


def test_a_terminated_compile_ends_with_the_shells_code():
    with pytest.raises(SystemExit) as found, interruptible():
        send(signal.SIGTERM)
    assert found.value.code == 143


def test_errors_without_a_signal_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mine"), interruptible():
        raise RuntimeError("mine")


def test_a_handler_of_the_programs_own_is_left_alone():
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with interruptible():
        send(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_other_threads_compile_without_handlers():
    """Python lets only the main thread set them."""
    handlers = []

    def compile_():
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=compile_)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]
