"""The plug-in by itself: memory, copies, modules, and how it is built."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from pretended_device import PretendedDevice

from llmc import device_plugin
from llmc.errors import CompileError
from llmc.targets.registry import open_target
from llmc.targets.vulkan import spirv
from llmc.targets.vulkan.build import module_bytes, register
from llmc.targets.vulkan.glsl_kernel import Kernel
from llmc.targets.vulkan.status import lacks

ROOT = Path(__file__).parents[3]
rng = np.random.default_rng(0)


@pytest.fixture
def device():
    register()
    return tvm.device("vulkan", 0)


def test_more_tensors_than_a_driver_allows_allocations_keep_their_contents(device):
    arrays = [rng.standard_normal(int(n)).astype("float32") for n in rng.integers(1, 300, 5000)]
    tensors = [tvm.runtime.tensor(a, device) for a in arrays]
    # Every other one is freed and its place used again, by larger ones and smaller ones.
    for i in range(0, len(arrays), 2):
        arrays[i] = rng.standard_normal(int(rng.integers(1, 600))).astype("float32")
        tensors[i] = tvm.runtime.tensor(arrays[i], device)
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_copies_on_the_device_and_of_views_reach_their_place(device):
    array = np.arange(300, dtype="int32").reshape(3, 100)
    tensor = tvm.runtime.tensor(array, device)
    other = tvm.runtime.empty((3, 100), "int32", device)
    tensor.copyto(other)
    np.testing.assert_array_equal(other.numpy(), array)


COPIES = """
import numpy as np, tvm
from llmc.targets.vulkan.build import register
register()
device = tvm.device("vulkan", 0)
for count in (0, 1, 5, 2**21 - 1, 5 * 2**20 + 3):
    arrays = [np.random.default_rng(i).integers(0, 2**31, count, "int32") for i in range(3)]
    tensors = [tvm.runtime.tensor(a, device) for a in arrays]
    for array, tensor in zip(arrays, tensors):
        assert (tensor.numpy() == array).all(), count
print("equal")
"""


@pytest.mark.parametrize("staging", ["0", "1"])
def test_copies_of_every_size_arrive_directly_and_through_staging(staging):
    done = subprocess.run(
        [sys.executable, "-c", COPIES],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LLMC_VULKAN_STAGING": staging},
    )
    assert done.stdout == "equal\n", done.stderr


def test_too_large_a_tensor_is_refused_by_vulkans_name_and_nothing_breaks(device):
    with pytest.raises(RuntimeError, match="VK_ERROR_OUT_OF_DEVICE_MEMORY: 4398046511104 bytes"):
        tvm.runtime.empty((2**40,), "float32", device)
    np.testing.assert_array_equal(
        tvm.runtime.tensor(np.ones(3, "int8"), device).numpy(), np.ones(3)
    )


def module():
    """The bytes of a module with one kernel."""
    source = "#version 460\nlayout(local_size_x = 1) in;\nvoid main() {}\n"
    kernel = Kernel(
        name="nothing",
        source=source,
        arguments=(),
        launch=(),
        folds_x=False,
        in_buffer=False,
        workgroup=(1, 1, 1),
        shared_bytes=0,
        features=frozenset({"shaderInt8"}),
    )
    return module_bytes([kernel])


def test_a_module_names_its_kernels_and_what_they_need(device):
    loaded = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")(module())
    assert loaded.implements_function("nothing")
    assert not loaded.implements_function("something")
    features = set(loaded.get_function("llmc_features")())
    assert {"bufferDeviceAddress", "shaderInt8", "threads128", "shared16384"} <= features


def test_damaged_modules_are_refused_before_a_driver_sees_them(device):
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")
    whole = module()
    for cut in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="cut short"):
            load(whole[:cut])
    code = whole.index(b"\x03\x02\x23\x07")
    for at in (code, code + 40, len(whole) // 2):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        with pytest.raises(ValueError, match="SPIR-V of kernel nothing is damaged"):
            load(bytes(damaged))
    with pytest.raises(ValueError, match="not a module of kernels of this version"):
        load(b"LLMCVK99" + whole[8:])


HUGE = """
import tvm
from tvm.script import tirx as T
from pretended_device import PretendedDevice
from vulkan_build import compiled

@T.prim_func(s_tir=True)
def main(x: T.Buffer((2**32,), "int8")):
    for thread in T.thread_binding(1, thread="threadIdx.x"):
        x[thread] = T.int8(1)

library = compiled(main)
try:
    library["main"](tvm.runtime.empty((2**32,), "int8", tvm.device("vulkan", 0)))
except RuntimeError as error:
    print(error)
"""


def test_a_tensor_beyond_32_bit_indices_is_refused(tmp_path):
    try:
        pretended = PretendedDevice(tmp_path)
    except FileNotFoundError as exc:
        pytest.skip(str(exc))
    script = tmp_path / "script.py"
    script.write_text(HUGE)
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            **pretended.environment(heap_bytes=2**34),
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )
    assert "4294967296 elements, more than 2^31" in done.stdout, done.stderr


def test_missing_tools_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(spirv, "_wheel_prefix", lambda: None)
    hint = 'apt-get install glslang-tools spirv-tools, or pip install "llmc[vulkan]"'
    with pytest.raises(CompileError, match=re.escape(f"hint: {hint}")):
        spirv.compile_glsl("k", "a source that was not compiled before")
    with pytest.raises(CompileError, match="needs glslangValidator, spirv-opt, spirv-val"):
        open_target("vulkan")
    [tools] = [lack for lack in lacks() if not lack.run]
    assert tools.hint == hint


def test_tools_of_wheels_do_where_the_system_has_none(monkeypatch):
    if spirv._wheel_prefix() is None:
        pytest.skip('needs pip install "llmc[vulkan]"')
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    source = "#version 460\nlayout(local_size_x = 3) in;\nvoid main() {}\n"
    assert spirv.compile_glsl("k", source).startswith(b"\x03\x02\x23\x07")
    assert not [lack for lack in lacks() if not lack.run]


def test_glsl_that_is_wrong_is_an_error_with_the_tools_words():
    with pytest.raises(CompileError, match=r"(?s)kernel k: glslangValidator failed: .*nonsense"):
        spirv.compile_glsl("k", "#version 460\nvoid main() { nonsense\n")


def test_a_machine_without_a_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(CompileError, match=r"hint: apt-get install g\+\+ libvulkan-dev"):
        device_plugin.build_plugin("vulkan")
    assert not list(tmp_path.rglob("*.so"))


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-E*) exit 0;; esac\necho no luck >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CompileError, match=r"building the vulkan plug-in with .* failed: no luck"):
        device_plugin.build_plugin("vulkan")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_another_version_of_tvm_gets_a_library_of_its_own(monkeypatch):
    plugin = device_plugin.PLUGINS["vulkan"]
    key = device_plugin._key(plugin)
    assert device_plugin._key(plugin) == key
    monkeypatch.setattr(device_plugin.importlib.metadata, "version", lambda package: "0.99")
    assert device_plugin._key(plugin) != key
