"""Puts every plug-in's library into the package for a wheel, and prints the wheel's platform."""

from __future__ import annotations

import platform
import sys
import sysconfig

from llmc.device_plugin import PLUGINS, PREBUILT, build_plugin


def main() -> None:
    """Builds for this machine's versions of TVM and its ffi; raises CompileError."""
    for name in PLUGINS:
        build_plugin(name, PREBUILT)
    sys.stdout.write(wheel_platform() + "\n")


def wheel_platform() -> str:
    """The tag of wheels with libraries built here: on Linux the C library's version is in it."""
    libc, version = platform.libc_ver()
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if libc != "glibc":
        return system
    return system.replace("linux", f"manylinux_{version.replace('.', '_')}", 1)


if __name__ == "__main__":
    main()
