"""The plug-in on a HIP runtime of our own: host memory, kernels that do nothing, a log of calls."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tvm
from tvm.script import tirx as T

from llmc.targets.rocm.target import RocmTarget

HERE = Path(__file__).parent
BEGIN = """
import sys, numpy as np
from llmc.runtime import tvm_runtime
from llmc.runtime.devices import DEVICES
rocm = DEVICES["rocm"]
ffi = tvm_runtime.tvm_ffi()

def explained(call):
    try:
        call()
    except Exception as error:
        found = error if hasattr(error, "hint") else rocm.explain(error)
        print(type(found).__name__, found)
    else:
        print("nothing happened")

"""
PREPARED = "rocm.prepare(0)\ndevice = ffi.device('rocm', 0)\n"


@pytest.fixture(scope="module")
def hip(rocm, tmp_path_factory):
    """The folder of the fake runtime's library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("hip")
    source, library = HERE / "fake_hip.c", folder / "libamdhip64.so.6"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


@pytest.fixture
def calls(hip, tmp_path):
    """Runs Python code on the fake runtime; what it printed, and HIP's calls."""

    def run(code, *arguments, **variables):
        log = tmp_path / "log"
        log.write_text("")
        places = {"LD_LIBRARY_PATH": str(hip), "FAKE_HIP_LOG": str(log)}
        done = subprocess.run(
            [sys.executable, "-c", BEGIN + code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **places, **variables},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text().splitlines()

    return run


@pytest.fixture(scope="module")
def library(rocm, tmp_path_factory):
    """One kernel with an argument of each kind, for two architectures."""

    @T.prim_func(s_tir=True)
    def scale(x: T.handle, y: T.handle, factor: T.float32, offset: T.int32) -> None:
        n = T.int64()
        X = T.match_buffer(x, (n, 64), "float32")
        Y = T.match_buffer(y, (n, 64), "float32")
        for row in T.thread_binding(n, thread="blockIdx.x"):
            for column in T.thread_binding(64, thread="threadIdx.x"):
                Y[row, column] = X[row, column] * factor + T.Cast("float32", offset)

    target = RocmTarget("gfx90a,gfx942")
    scaled = scale.with_attr("global_symbol", "scale").with_attr("tirx.is_scheduled", True)
    built = tvm.compile(tvm.IRModule({"scale": scaled}), target=target.tvm_target)
    path = tmp_path_factory.mktemp("library") / target.library_name
    assert target.link(built, path) == ["gfx90a or gfx942"]
    return path


LAUNCH = (
    PREPARED
    + """
module = ffi.load_module(sys.argv[1])
x = tvm_runtime.copy_to(np.ones((3, 64), np.float32), device)
y = tvm_runtime.empty((3, 64), "float32", device)
explained(lambda: (module["scale"](x, y, 0.5, -7), tvm_runtime.wait_for(device)))
"""
)


def test_a_launch_passes_every_argument_in_its_place(calls, library):
    _, log = calls(LAUNCH, library)
    [loaded] = [line for line in log if line.startswith("load")]
    assert loaded == "load machine 0x4c"  # of two code objects that of gfx942
    [launched] = [line for line in log if line.startswith("launch")]
    assert launched.startswith("launch scale_kernel grid 3 1 1 block 64 1 1 on 0 arguments ")
    packed = bytes.fromhex(launched.split("arguments")[1])
    # TVM orders a kernel's arguments: pointers, then scalars.
    first, second, *numbers = struct.unpack(f"<QQ{(len(packed) - 16) // 4}I", packed)
    assert first != second
    assert {struct.unpack("<I", struct.pack("<f", 0.5))[0], 2**32 - 7} <= set(numbers)
    assert log.index(loaded) < log.index(launched)
    assert "wait" in log[log.index(launched) :]


def test_another_architecture_of_the_artifact_gets_its_own_code(calls, library):
    _, log = calls(LAUNCH, library, FAKE_HIP_ARCH="gfx90a:sramecc+:xnack-")
    assert "load machine 0x3f" in log


def test_an_architecture_without_code_is_named_with_those_that_have_it(calls, library):
    said, _ = calls(LAUNCH, library, FAKE_HIP_ARCH="gfx1030")
    assert "ArtifactError HIP: no code for gfx1030: the artifact has it for gfx90a, gfx942" in said
    assert "hint: compile the model with --target rocm:" in said


def test_a_failed_launch_is_named_by_hips_name_and_the_kernels(calls, library):
    said, _ = calls(LAUNCH, library, FAKE_HIP_FAIL="hipModuleLaunchKernel")
    assert said == "LlmcError HIP: hipErrorLaunchFailure: the launch of kernel scale_kernel\n"
    said, _ = calls(LAUNCH, library, FAKE_HIP_FAIL="hipModuleLoadData", FAKE_HIP_ERROR="209")
    assert "ArtifactError HIP: hipErrorNoBinaryForGpu: hipModuleLoadData of the code for" in said


def test_damaged_code_is_refused_before_a_driver_sees_it(calls, library, tmp_path):
    data = bytearray(library.read_bytes())
    [place] = [m.start() for m in re.finditer(b"LLMCRO01", data)]
    for change, words in ((0, "not a module of kernels"), (3000, "is damaged")):
        damaged = bytearray(data)
        damaged[place + change] ^= 1
        path = tmp_path / f"{change}.so"
        path.write_bytes(damaged)
        said, log = calls(PREPARED + "explained(lambda: ffi.load_module(sys.argv[1]))", path)
        assert words in said
        assert not any(line.startswith("load") for line in log)


UNSEEN = """
from llmc.device_plugin import load_plugin
load_plugin("rocm")
module = ffi.load_module(sys.argv[1])
print(module.implements_function("scale", query_imports=True), [m.kind for m in module.imports])
"""


def test_a_library_loads_and_names_its_kernels_where_there_is_no_hip(calls, library):
    """Loading executes nothing on a device: the code objects wait for one."""
    said, log = calls(UNSEEN, library, LD_LIBRARY_PATH="/none")
    assert said == "True ['llmc_rocm']\n"
    assert log == []


COPIES = (
    PREPARED
    + """
for count in (0, 1, 5, 100_003):
    array = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    assert (tvm_runtime.copy_from(tvm_runtime.copy_to(array, device)) == array).all(), count
print(rocm.available_bytes(0), sorted(rocm.features(0)))
"""
)


def test_copies_of_every_size_arrive_and_wait_for_the_host(calls):
    said, log = calls(COPIES)
    assert said == f"{2**30} ['gfx90a or gfx942', 'gfx90a or gfx942 or gfx1100', 'gfx942', " + (
        "'gfx942 or gfx1100']\n"
    )
    copies = [n for n, line in enumerate(log) if line.startswith("copy")]
    assert len(copies) == 6  # of nothing there is none
    assert all(log[n + 1] == "wait" for n in copies)
    allocated = [line for line in log if line.startswith("malloc")]
    assert len(allocated) == len([line for line in log if line.startswith("free")]) == 4


WORKSPACES = (
    PREPARED
    + """
import ctypes
runtime = ctypes.CDLL("libtvm_runtime.so")
allocate, free = runtime.TVMBackendAllocWorkspace, runtime.TVMBackendFreeWorkspace
allocate.restype, free.restype = ctypes.c_void_p, ctypes.c_int
allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
free.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
for step in range(3):
    for bytes_ in (5000, 100000, 300):
        memory = allocate(10, 0, bytes_, 2, 32)
        assert memory
        assert free(10, 0, memory) == 0
large = allocate(10, 0, 90000, 2, 32)
small = allocate(10, 0, 10, 2, 32)
assert small != large
"""
)


def test_workspaces_are_kept_and_never_more_than_the_largest(calls):
    _, log = calls(WORKSPACES)
    assert [line for line in log if not line.startswith("wait")] == [
        "malloc 8192 on 0",
        "free 8192",
        "malloc 102400 on 0",
        "malloc 4096 on 0",
    ]


def test_too_large_a_tensor_is_refused_with_its_size(calls):
    code = PREPARED + "explained(lambda: tvm_runtime.empty((2**28,), 'float32', device))"
    said, _ = calls(code, FAKE_HIP_BYTES="1000000")
    assert said.startswith(
        "CapacityError HIP: hipErrorOutOfMemory: hipMalloc of 1073741824 bytes\nhint: lower --kv"
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LD_LIBRARY_PATH": "/none"}, "no HIP runtime (libamdhip64.so) is installed"),
        ({"FAKE_HIP_COUNT": "0"}, "the HIP runtime finds no device"),
        (
            {"FAKE_HIP_FAIL": "hipGetDeviceCount"},
            "the HIP runtime does not start: hipErrorLaunchFailure",
        ),
    ],
    ids=["no runtime", "no device", "a runtime that fails"],
)
def test_what_is_missing_is_said_with_what_brings_it(calls, variables, words):
    said, _ = calls("explained(lambda: rocm.prepare(0))", **variables)
    assert f"ArtifactError no ROCm device: {words}\nhint: install AMD's driver" in said


def test_a_wrong_index_names_the_devices_there_are(calls):
    said, _ = calls("explained(lambda: rocm.prepare(7))", FAKE_HIP_COUNT="2")
    assert (
        "UsageError there is no device rocm:7\nhint: there are 0: Fake Instinct 0 (gfx942)" in said
    )
    assert "1: Fake Instinct 1 (gfx942)" in said


def test_a_second_device_gets_its_own_code_and_memory(calls, library):
    _, log = calls(LAUNCH.replace("'rocm', 0", "'rocm', 1"), library, FAKE_HIP_COUNT="2")
    assert [line for line in log if line.startswith("malloc")] == ["malloc 768 on 1"] * 2
    assert any(line.startswith("launch") and " on 1 " in line for line in log)


def test_a_machine_without_a_compiler_says_what_to_install(monkeypatch, tmp_path):
    from llmc import device_plugin
    from llmc.errors import CompileError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(CompileError, match=r"hint: apt-get install g\+\+$"):
        device_plugin.build_plugin("rocm")
