"""Exit codes, where output goes, and that nothing heavy is imported to say hello."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from llmc import __version__
from llmc.cli import main
from llmc.cli.manual import manual
from llmc.errors import CapacityError, CompileError, LlmcError, UnsupportedError, VerifyError

ROOT = Path(__file__).parents[2]


def run_module(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc.cli.main", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_the_written_reference_is_that_of_the_commands() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == manual(), "run: python -m llmc.cli.manual docs/cli.md"


def test_help_imports_nothing_that_takes_time() -> None:
    heavy = ["torch", "transformers", "tvm", "numpy", "rich", "fastapi", "pydantic", "tokenizers"]
    code = (
        "import sys; from llmc.cli.main import invoke; invoke(['--help']);"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_prompt_on_a_pipe_imports_neither_a_spinner_nor_other_commands() -> None:
    unused = ["rich", "fastapi", "pydantic", "tvm", "torch", "llmc.cli.bench", "llmc.cli.serve"]
    code = (
        "import sys; from llmc.cli.main import invoke;"
        "code = invoke(['run', '/nowhere', '-p', 'a']);"
        f"used = [m for m in {unused} if m in sys.modules];"
        "print(code, 'llmc.runtime.engine' in sys.modules, used)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "6 True []"


def test_version_and_help_go_to_stdout(llmc) -> None:
    assert llmc("--version") == (0, f"llmc, version {__version__}\n", "")
    code, out, err = llmc("-h")
    assert (code, err) == (0, "")
    for command in ("compile", "run", "chat", "serve", "bench", "verify", "inspect", "eval"):
        assert f"  {command} " in out


@pytest.mark.parametrize("arguments", [["bogus"], ["run"], ["serve", ".", "--port", "99999"]])
def test_wrong_usage_is_exit_code_2(llmc, arguments: list[str]) -> None:
    code, out, err = llmc(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedError("no such operator", hint="try another"), 4),
        (VerifyError("wrong"), 7),
        (CapacityError("too large"), 8),
        (LlmcError("something"), 1),
    ],
)
def test_an_error_is_a_line_a_hint_and_its_exit_code(
    llmc, monkeypatch: pytest.MonkeyPatch, error: LlmcError, code: int
) -> None:
    _add_command(monkeypatch, error)
    expected = f"error: {error.message}\n"
    if error.hint:
        expected += f"hint: {error.hint}\n"
    assert llmc("fail") == (code, "", expected)


def test_a_bug_is_one_line_and_a_traceback_only_when_asked(
    llmc, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_command(monkeypatch, ValueError("oops\nand the whole module"))
    code, out, err = llmc("fail")
    assert (code, out) == (70, "")
    assert err.startswith("error: ValueError: oops\nhint: this is a bug in llmc")
    assert "Traceback" not in err
    monkeypatch.setenv("LLMC_DEBUG", "1")
    with pytest.raises(ValueError, match="oops"):
        llmc("fail")


def test_an_interrupt_is_exit_code_130(llmc, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_command(monkeypatch, KeyboardInterrupt())
    code, out, _ = llmc("fail")
    assert (code, out) == (130, "")


def test_a_termination_is_exit_code_143(llmc, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_command(monkeypatch, SystemExit(143))
    assert llmc("fail") == (143, "", "terminated\n")


def test_a_failed_phase_shows_its_cause_when_asked(llmc, monkeypatch: pytest.MonkeyPatch) -> None:
    error = CompileError("phase fuse failed")
    error.__cause__ = KeyError("lv3")
    _add_command(monkeypatch, error)
    assert llmc("fail") == (5, "", "error: phase fuse failed\n")
    monkeypatch.setenv("LLMC_DEBUG", "1")
    with pytest.raises(CompileError) as found:
        llmc("fail")
    assert found.value.__cause__ is error.__cause__


def _add_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setitem(main.cli.commands, "fail", fail)


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "llmc.cli.main", "--help"],
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_honoured_on_a_terminal(no_color: str) -> None:
    terminal, stderr = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", "inspect", "/nowhere"],
        cwd=ROOT,
        stderr=stderr,
        env={**os.environ, "NO_COLOR": no_color, "TERM": "xterm"},
        check=False,
    )
    written = os.read(terminal, 4096).decode()
    os.close(terminal)
    os.close(stderr)
    assert "error:" in written
    assert ("\x1b[" in written) is (no_color == "")


def test_a_missing_artifact_is_exit_code_6_with_a_hint() -> None:
    done = run_module("inspect", "/nowhere/at/all")
    assert done.returncode == 6
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: /nowhere/at/all: no such folder",
        "hint: give a folder that `llmc compile` wrote",
    ]
