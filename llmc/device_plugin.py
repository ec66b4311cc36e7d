"""Plug-ins that teach the TVM runtime a device its wheel does not know: prebuilt, or built here.

A plug-in is C++17 against the headers in TVM's wheel, in the folder `plugin` of its target. Its
library is good for these very versions of TVM and tvm_ffi only, so its name has a hash of them and
of the sources. Wheels bring it (`make wheel`); where none fits, it is built when it is first needed
and kept in the user's cache. Imports neither: the server loads plug-ins too.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmc.errors import CompileError

_COMPILERS = ("g++", "c++", "clang++")
_TAIL = 600  # characters of a compiler's complaint that are shown
PREBUILT = Path(__file__).parent / "prebuilt"  # in wheels


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """Sources of a plug-in and the Debian packages that building it takes."""

    folder: Path
    packages: tuple[str, ...]
    header: str | None = None  # one that a development package brings


_TARGETS = Path(__file__).parent / "targets"
_SHARED = _TARGETS / "gpu" / "plugin"  # headers

PLUGINS: dict[str, Plugin] = {
    "rocm": Plugin(folder=_TARGETS / "rocm" / "plugin", packages=("g++",)),
    "vulkan": Plugin(
        folder=_TARGETS / "vulkan" / "plugin",
        header="vulkan/vulkan.h",
        packages=("g++", "libvulkan-dev"),
    ),
}


@cache
def load_plugin(name: str) -> None:
    """Loads the plug-in, built first where neither wheel nor cache has it; raises CompileError.

    TVM's runtime libraries have to be loaded before.
    """
    # A prebuilt library may want a newer C++ library than this machine has.
    if _loads(PREBUILT / library_name(name)) is None:
        return
    library = build_plugin(name)
    problem = _loads(library)
    if problem is not None:
        raise CompileError(
            f"the {name} plug-in does not load: {problem[-_TAIL:]}",
            hint=f"remove {library} to have it built again",
        )


def load_built_plugins() -> None:
    """Loads the plug-ins that are there already; what `import tvm` calls, of group tvm.backends.

    Nothing is built: a program that imports TVM did not ask for that.
    """
    for name in PLUGINS:
        if _loads(PREBUILT / library_name(name)) is not None:
            _loads(cache_folder() / "plugins" / library_name(name))


def library_name(name: str) -> str:
    """The file of the plug-in for this machine's versions."""
    return f"{name}-{_key(PLUGINS[name])}.so"


def _loads(library: Path) -> str | None:
    """None once the library is loaded, else why it is not."""
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as exc:
        return str(exc)
    return None


def build_plugin(name: str, folder: Path | None = None) -> Path:
    """The library of the plug-in in `folder` (the cache), built where it is not there yet.

    Raises CompileError.
    """
    plugin = PLUGINS[name]
    library = (folder or cache_folder() / "plugins") / library_name(name)
    if library.exists():
        return library
    missing = missing_packages(name)
    if missing:
        raise CompileError(
            f"the {name} plug-in has to be built, once, and needs {' and '.join(missing)}",
            hint=f"apt-get install {' '.join(missing)}",
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = Path(scratch) / library.name
            _compile(name, plugin, fresh)
            fresh.replace(library)  # at once: another process may be building it too
    except OSError as exc:
        raise CompileError(
            f"the {name} plug-in cannot be kept in {library.parent}: {exc.strerror or exc}",
            hint="XDG_CACHE_HOME names another place for caches",
        ) from exc
    return library


def missing_packages(name: str) -> list[str]:
    """Those of Debian's packages without which the plug-in cannot be built."""
    plugin = PLUGINS[name]
    compiler = _compiler()
    if compiler is None:
        return list(plugin.packages)
    if plugin.header is None:
        return []
    done = subprocess.run(
        [*compiler, "-E", "-x", "c++", "-"],
        input=f"#include <{plugin.header}>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    return list(plugin.packages[1:]) if done.returncode else []


def cache_folder() -> Path:
    """Where llmc keeps what it can make again: `$XDG_CACHE_HOME/llmc` or `~/.cache/llmc`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "llmc"


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([tool] for tool in _COMPILERS if shutil.which(tool)), None)


def _sources(plugin: Plugin) -> list[Path]:
    folders = (plugin.folder, _SHARED)
    return sorted(p for folder in folders for p in folder.iterdir() if p.suffix in (".cc", ".h"))


def _key(plugin: Plugin) -> str:
    """Changes with everything that the library depends on."""
    import importlib.metadata  # 20 ms, of which other devices have nothing

    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for package in ("apache-tvm", "apache-tvm-ffi"):
        digest.update(importlib.metadata.version(package).encode())
    for source in _sources(plugin):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(name: str, plugin: Plugin, output: Path) -> None:
    compiler = _compiler()
    assert compiler is not None, "missing_packages has looked"
    # Headers of others are not ours to warn about.
    includes = [f"-isystem{_package(package) / 'include'}" for package in ("tvm", "tvm_ffi")]
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    sources = [str(p) for p in _sources(plugin) if p.suffix == ".cc"]
    includes.append(f"-I{_SHARED}")
    command = [*compiler, *options, *undefined, *includes, "-o", str(output), *sources, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"building the {name} plug-in with {compiler[0]} failed: {done.stderr[-_TAIL:]}",
            hint="CXX names another C++ compiler",
        )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"{name} is not installed", hint="pip install llmc")
    return Path(spec.submodule_search_locations[0])
