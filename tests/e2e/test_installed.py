"""What `pip install` brings is enough to build for GPUs: no toolkit, no linker of the system's."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import TINY, save_random_model

from llmc.targets.cuda.toolkit import find_tool

sys.path.append(str(Path(__file__).parents[1] / "targets" / "cuda"))
from cuda_code import architectures

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUANT = ("--quant", "w4a16-g32")
_NO_NETWORK = r"(?i)connection|name resolution|timed out|no matching distribution"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A fresh one, with the versions of PyTorch and transformers that these tests run with."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    generated = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=generated)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    wanted = folder / "constraints.txt"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    wanted.write_text("".join(f"{n}=={v.partition('+')[0]}\n" for n, v in versions.items()))
    pip = [folder / "env/bin/python", "-m", "pip", "install", "-q", "-c", wanted]
    done = subprocess.run(
        [*pip, f"{source}[compile,cuda,metal]"], capture_output=True, text=True, check=False
    )
    if done.returncode and re.search(_NO_NETWORK, done.stderr):
        pytest.skip(f"pip cannot install: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder / "env"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_random_model("llama", TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run_installed(environment, tmp_path_factory):
    """Runs the environment's `llmc` where PATH shows no tool that the packages bring."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    places = [p for p in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvcc", path=p)]
    hidden = ("CUDA_", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    variables = {n: v for n, v in os.environ.items() if not n.startswith(hidden)}
    variables["PATH"] = os.pathsep.join([str(environment / "bin"), *places])
    variables["XDG_CACHE_HOME"] = str(elsewhere / "cache")

    def run(*command: object) -> str:
        done = subprocess.run(
            [environment / "bin" / command[0], *map(str, command[1:])],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            cwd=elsewhere,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_nvcc_and_libcudart_are_those_of_the_packages(run_installed, environment) -> None:
    said = run_installed(
        "python",
        "-c",
        "from llmc.targets.cuda.toolkit import find_cudart, find_tool\n"
        "print(find_tool('nvcc'), find_cudart(), sep='\\n')",
    )
    for place in said.splitlines():
        assert Path(place).is_relative_to(environment), place


def test_cuda_libraries_hold_machine_code(run_installed, model, tmp_path) -> None:
    if find_tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump")
    out = tmp_path / "artifact"
    run_installed("llmc", "compile", model, "--target", "cuda:sm_80,sm_90", *QUANT, "-o", out)
    assert b"__global__" not in (out / "model.so").read_bytes()
    assert architectures(out / "model.so", tmp_path) == (["sm_80", "sm_90a"], ["sm_90"])


@pytest.mark.parametrize(
    ("target", "library", "begins"),
    [("metal", "model.dylib", "cffaedfe"), ("rocm:gfx90a,gfx942", "model.so", "7f454c46")],
)
def test_the_other_targets_link(run_installed, model, tmp_path, target, library, begins) -> None:
    out = tmp_path / "artifact"
    run_installed("llmc", "compile", model, "--target", target, *QUANT, "-o", out)
    assert (out / library).read_bytes().startswith(bytes.fromhex(begins))
    kernels = json.loads(run_installed("llmc", "inspect", out, "--json"))["kernels"]
    assert {kernel["rule"].partition(".")[0] for kernel in kernels} >= {target.partition(":")[0]}
