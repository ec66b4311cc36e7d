"""Where the plug-in's library comes from: a wheel, the cache, a compiler; and what it keeps."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llmc import device_plugin, prebuild

ROOT = Path(__file__).parents[3]
# What it prints: whether TVM knows the device, and how often a compiler was started.
LOAD = """
import sys
from pathlib import Path
from llmc import device_plugin
from llmc.runtime import tvm_runtime
device_plugin.PREBUILT = Path(sys.argv[1])
ffi = tvm_runtime.tvm_ffi()
{call}
print(ffi.get_global_func("device_api.vulkan", allow_missing=True) is not None)
"""
NO_COMPILER = {"CXX": "/none/c++"}


def python(code, *arguments, **variables):
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory):
    """A folder as a wheel has it."""
    folder = tmp_path_factory.mktemp("prebuilt")
    shutil.copy(device_plugin.build_plugin("vulkan"), folder)
    return folder


def test_a_wheels_library_needs_neither_compiler_nor_cache(prebuilt, tmp_path):
    code = LOAD.format(call='device_plugin.load_plugin("vulkan")')
    assert python(code, prebuilt, XDG_CACHE_HOME=str(tmp_path), **NO_COMPILER) == ["True"]
    assert list(tmp_path.iterdir()) == []


def test_a_library_for_other_versions_is_passed_over(prebuilt, tmp_path):
    (tmp_path / "vulkan-0123456789abcdef.so").write_bytes(b"of another TVM")
    code = LOAD.format(call='device_plugin.load_plugin("vulkan")')
    assert python(code, tmp_path) == ["True"]  # the cache's


def test_a_prebuilt_library_that_does_not_load_is_passed_over(prebuilt, tmp_path):
    (tmp_path / device_plugin.library_name("vulkan")).write_bytes(b"of a newer C++ library")
    code = LOAD.format(call='device_plugin.load_plugin("vulkan")')
    assert python(code, tmp_path) == ["True"]


def test_importing_tvm_loads_what_is_there_and_builds_nothing(prebuilt, tmp_path):
    code = LOAD.format(call="device_plugin.load_built_plugins()")
    empty = {"XDG_CACHE_HOME": str(tmp_path)}
    assert python(code, prebuilt, **empty, **NO_COMPILER) == ["True"]
    assert python(code, tmp_path, **empty) == ["False"]
    assert list(tmp_path.iterdir()) == []


def test_tvm_comes_through_the_entry_point(prebuilt, tmp_path):
    with (ROOT / "pyproject.toml").open("rb") as file:
        [(name, value)] = tomllib.load(file)["project"]["entry-points"]["tvm.backends"].items()
    assert EntryPoint(name, value, "tvm.backends").load() is device_plugin.load_built_plugins
    installed = tmp_path / "some_plugin-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[tvm.backends]\n{name} = {value}\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    code = """
import tvm, tvm_ffi
print(tvm.device("vulkan", 0).exist)
"""
    assert python(code, PYTHONPATH=paths) == ["True"]


def test_wheels_name_the_c_library_they_were_built_with(monkeypatch):
    monkeypatch.setattr(prebuild.sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(prebuild.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert prebuild.wheel_platform() == "manylinux_2_36_x86_64"
    monkeypatch.setattr(prebuild.sysconfig, "get_platform", lambda: "macosx-11.0-arm64")
    monkeypatch.setattr(prebuild.platform, "libc_ver", lambda: ("", ""))
    assert prebuild.wheel_platform() == "macosx_11_0_arm64"


@pytest.mark.slow
def test_the_wheel_serves_vulkan_on_a_machine_without_a_compiler(tmp_path):
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    copy, wheels, target = (tmp_path / name for name in ("copy", "wheels", "installed"))
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def run(*command):
        return subprocess.check_output(
            [sys.executable, "-m", *command], cwd=copy, text=True, env=environment
        ).strip()

    option = f"-C--build-option=--plat-name={run('llmc.prebuild')}"
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", option, "-w", wheels, ".")
    [wheel] = wheels.iterdir()
    run("pip", "install", "-q", "--no-deps", "--target", target, wheel)
    code = """
from llmc.runtime.devices import DEVICES
DEVICES["vulkan"].prepare(0)
print("bufferDeviceAddress" in DEVICES["vulkan"].features(0))
"""
    cache = tmp_path / "cache"
    variables = {"PYTHONPATH": str(target), "XDG_CACHE_HOME": str(cache), **NO_COMPILER}
    assert python(code, **variables) == ["True"]
    assert not cache.exists()


PIPELINES = """
import numpy as np, tvm
from vulkan_build import run
from tvm.script import tirx as T

@T.prim_func(s_tir=True)
def main(x: T.Buffer((8,), "float32")):
    for thread in T.thread_binding(8, thread="threadIdx.x"):
        x[thread] = x[thread] + T.float32(1)

[x] = run(main, np.ones(8, "float32"))
print(x.sum())
"""


def test_pipelines_are_kept_under_the_devices_own_id(tmp_path):
    # The library stays where it is: only what the device keeps is new.
    (tmp_path / "llmc").mkdir()
    (tmp_path / "llmc" / "plugins").symlink_to(device_plugin.cache_folder() / "plugins")
    here, script = Path(__file__).parent, tmp_path / "script.py"
    script.write_text(PIPELINES)
    run = "import runpy, sys; runpy.run_path(sys.argv[1])"
    variables = {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(here), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    assert python(run, script, **variables) == ["16.0"]
    [kept] = (tmp_path / "llmc" / "vulkan").iterdir()
    data = kept.read_bytes()
    # VkPipelineCacheHeaderVersionOne: size, version, vendor, device, then the id of 16 bytes.
    assert data[16:32].hex() == kept.stem
    # A damaged one is no obstacle, and is replaced.
    for other in (b"nonsense", data[: len(data) // 2]):
        kept.write_bytes(other)
        assert python(run, script, **variables) == ["16.0"]
        assert kept.read_bytes()[16:32].hex() == kept.stem


@pytest.mark.slow
def test_the_address_sanitizer_has_nothing_to_say(tmp_path):
    # It wants to be the first library, and to find the functions of C++ exceptions at its start.
    preloaded = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, preloaded)):
        pytest.skip("needs g++ with its address sanitizer")
    log = tmp_path / "asan"
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": "g++ -g -fsanitize=address -fno-omit-frame-pointer",
    }
    build = "from llmc import device_plugin as p; print(p.build_plugin('vulkan'))"
    library = python(build, **environment)[0]
    assert b"__asan_init" in Path(library).read_bytes()
    tests = ["test_plugin.py", "test_code_generator.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        env={
            **environment,
            "LD_PRELOAD": " ".join(preloaded),
            # Python and the driver leave memory behind; the JIT compiler's code has no frames.
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}:handle_segv=0",
        },
    )
    reports = [p.read_text() for p in tmp_path.glob("asan.*")]
    assert reports == []
    assert done.returncode == 0, done.stdout[-3000:]
