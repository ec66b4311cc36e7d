from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

from llmc.errors import CompileError
from llmc.targets.cpu import link
from llmc.targets.cpu.target import CpuTarget

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

HOST = link.Platform(machine=link.host_machine(), system="Linux")
ARM = link.Platform(machine="aarch64", system="Linux")
AARCH64 = 183  # e_machine, ELF specification


@I.ir_module
class Double:
    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((64,), "float32")):
        T.func_attr({"global_symbol": "double"})
        for i in T.parallel(64):
            with T.sblock("double"):
                v = T.axis.spatial(64, i)
                x[v] = x[v] * T.float32(2)


def build(target: CpuTarget):
    return tvm.compile(Double, target=target.tvm_target)


def elf_machine(path: Path) -> int:
    header = path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    return struct.unpack_from("<H", header, 18)[0]


def dynamic_symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names that the library defines and those that it needs, these with their versions."""
    command = ["readelf", "--dyn-syms", "--wide", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    symbols = [(row[6], row[7]) for row in rows if len(row) >= 8 and row[0][:-1].isdigit()]
    defined = {name for section, name in symbols if section != "UND"}
    return defined, {name for section, name in symbols if section == "UND"}


def test_a_library_for_arm_is_linked_on_any_machine(tmp_path) -> None:
    target = CpuTarget("neon")
    path = tmp_path / target.library_name
    target.link(build(target), path)
    assert elf_machine(path) == AARCH64
    defined, _ = dynamic_symbols(path)
    assert {
        "__tvm_ffi_double",
        "__tvm_ffi_llmc_set_threads",
        "llmc_parallel_launch",
        "__TVMBackendParallelLaunch",
    } <= defined


@pytest.mark.parametrize("level", ["avx2", "neon"])
def test_libraries_load_where_the_c_library_is_as_old_as_the_runtimes(tmp_path, level) -> None:
    """An artifact must not need a newer distribution than TVM's wheels do."""
    target = CpuTarget(level)
    path = tmp_path / target.library_name
    target.link(build(target), path)
    _, needed = dynamic_symbols(path)
    versions = {tuple(map(int, v)) for v in re.findall(r"@GLIBC_(\d+)\.(\d+)", " ".join(needed))}
    assert versions
    assert max(versions) <= (2, 28)


def test_cc_names_the_compiler(tmp_path, monkeypatch) -> None:
    record = tmp_path / "arguments"
    compiler = tmp_path / "my cc"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {record}\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}' -m64")
    link.link(build(CpuTarget()), tmp_path / "model.so", HOST)
    arguments = record.read_text(encoding="utf-8").split()
    assert arguments[0] == "-m64"
    assert str(link.THREADS) in arguments


@pytest.mark.skipif(HOST == ARM, reason="the compiler of this machine is right")
def test_cc_is_not_asked_to_link_for_another_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CC", "false")
    target = CpuTarget("neon")
    path = tmp_path / "model.so"
    target.link(build(target), path)
    assert elf_machine(path) == AARCH64


def test_a_system_compiler_links_where_zig_is_not_installed(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(link.shutil, "which", lambda tool: tool if tool == "gcc" else None)
    assert link._compiler(HOST) == ["gcc"]


def test_without_any_compiler_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(link.shutil, "which", lambda _: None)
    with pytest.raises(CompileError, match="this machine") as caught:
        link.link(build(CpuTarget()), tmp_path / "model.so", HOST)
    assert caught.value.hint == "pip install ziglang"
    with pytest.raises(CompileError, match="aarch64 Linux"):
        link._compiler(ARM)


def test_a_compiler_that_is_missing_or_fails_is_an_error(tmp_path, monkeypatch) -> None:
    executable = build(CpuTarget())
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(CompileError, match="'no-such-compiler', was not found"):
        link.link(executable, tmp_path / "model.so", HOST)
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n", encoding="utf-8")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    with pytest.raises(CompileError, match="no space left"):
        link.link(executable, tmp_path / "model.so", HOST)


@pytest.mark.parametrize(
    "compiler", [["gcc"], [sys.executable, "-m", "ziglang", "cc"]], ids=["gcc", "zig"]
)
def test_the_pool_compiles_without_a_warning(tmp_path, compiler) -> None:
    if link.shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} here")
    flags = ["-Wall", "-Wextra", "-Werror"]
    arguments = link._arguments(str(tmp_path / "pool.so"), [], HOST)
    subprocess.run([*compiler, *flags, *arguments], check=True)
