from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_artifact import install_fake_executor, toy_manifest, toy_reference, write_artifact

from llmc.cli.main import invoke

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def llmc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command line in this process over the toy: exit code, stdout, stderr."""
    install_fake_executor(monkeypatch)

    def run(*arguments: object) -> tuple[int, str, str]:
        command = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["llmc", *command])
        code = invoke(command)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "toy", reference=toy_reference(toy_manifest()))
    return tmp_path / "toy"
