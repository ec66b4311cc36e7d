"""`llmc chat` as a process: on a pipe and on a pseudo-terminal, Ctrl-C included."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_artifact import install_fake_executor, write_artifact

from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams

TOY_CLI = Path(__file__).parent / "toy_artifact.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOY_CLI.parents[2]), "TERM": "dumb"}


def command(artifact: Path, *options: str, delay_s: float = 0.0) -> list[str]:
    greedy = ["--temperature", "0", "--max-tokens", "12"]
    return [sys.executable, str(TOY_CLI), str(delay_s), "chat", str(artifact), *greedy, *options]


def talk(artifact: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(artifact, *options),
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )


def answers(artifact: Path, monkeypatch, conversation: list[str], system: str | None = None):
    """What the engine answers to each message, the earlier ones and answers before it."""
    install_fake_executor(monkeypatch)
    engine = Engine(artifact)
    messages = [{"role": "system", "content": system}] if system else []
    given = []
    for message in conversation:
        messages.append({"role": "user", "content": message})
        params = SamplingParams(temperature=0, max_tokens=12)
        given.append(engine.generate([engine.chat_prompt(messages)], params)[0].text)
        messages.append({"role": "assistant", "content": given[-1]})
    return given


def test_on_a_pipe_each_line_is_a_turn_of_one_conversation(artifact: Path, monkeypatch) -> None:
    first, second = answers(artifact, monkeypatch, ["hello", "and now?"], system="be brief")
    done = talk(artifact, "hello\n\nand now?\n", "--system", "be brief")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{second}\n"
    assert len(re.findall(r"12 generated", done.stderr)) == 2


def test_reset_forgets_all_but_the_system_message(artifact: Path, monkeypatch) -> None:
    (first,) = answers(artifact, monkeypatch, ["hello"], system="be brief")
    done = talk(artifact, "hello\n/reset\nhello\n/exit\nhello\n", "--system", "be brief")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{first}\n"


def test_commands_are_explained(artifact: Path) -> None:
    done = talk(artifact, "/help\n/hlep\n")
    assert done.stdout == ""
    assert "/reset" in done.stderr
    assert "unknown command /hlep" in done.stderr


def test_a_message_that_does_not_fit_is_dropped_and_the_talk_goes_on(
    artifact: Path, monkeypatch
) -> None:
    (first,) = answers(artifact, monkeypatch, ["hello"])
    done = talk(artifact, "hello " * 500 + "\nhello\n")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n"
    assert "the message was dropped" in done.stderr


def test_an_artifact_without_a_template_cannot_chat(tmp_path: Path) -> None:
    write_artifact(tmp_path / "plain", template=False)
    done = talk(tmp_path / "plain", "hello\n")
    assert done.returncode == 2
    assert "no chat template" in done.stderr
    assert "hint: llmc run" in done.stderr


def test_ctrl_c_on_a_pipe_stops_the_answer_and_not_the_program(artifact: Path, monkeypatch) -> None:
    process = subprocess.Popen(
        command(artifact, "--max-tokens", "100", "--ignore-eos", delay_s=0.02),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    try:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        assert b"[stopped]" in process.stderr.readline()
        _, err = process.communicate(b"/reset\nhello\n", timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    # The next answer is whole and timed by itself: 20 ms to its first token at least.
    assert b"100 generated; first token after" in err
    first_token_ms = re.search(rb"first token after (\d+) ms", err)
    assert int(first_token_ms[1]) >= 20


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, arguments: list[str]) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            # Where the tests are a shell's background job, which ignores it, children would, too.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(arguments[0], arguments, ENVIRONMENT)
        self._pid = pid
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, seconds: float = 20) -> None:
        """Reads until `pattern` has come; what was read before it is forgotten."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"{pattern!r} did not come: {self.seen!r}"
            self.seen += os.read(self._fd, 4096).decode("utf-8", "replace")
        self.seen = self.seen[match.end() :]

    def interrupt_until(self, pattern: str) -> None:
        """Presses Ctrl-C until `pattern` comes: readline can miss one while it sets itself up."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.expect(pattern, seconds=0.5)
        pytest.fail(f"{pattern!r} did not come: {self.seen!r}")

    def wait(self) -> int:
        deadline = time.monotonic() + 10
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                os.close(self._fd)
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def terminal(artifact: Path) -> Iterator[Terminal]:
    terminal = Terminal(command(artifact, "--max-tokens", "300", "--ignore-eos", delay_s=0.02))
    yield terminal
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(terminal._pid, signal.SIGKILL)
        os.waitpid(terminal._pid, 0)


def test_on_a_terminal_ctrl_c_stops_an_answer_or_a_line_and_ctrl_d_leaves(
    terminal: Terminal,
) -> None:
    terminal.expect("toy; /help")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("hello")
    terminal.expect(r"[\s\S]{8}")  # the answer has begun
    terminal.type("\x03")
    terminal.expect(r"\[stopped\]")
    terminal.expect("> ")
    terminal.type("half a li")
    terminal.expect("half a li")
    terminal.interrupt_until("Ctrl-D leaves")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
