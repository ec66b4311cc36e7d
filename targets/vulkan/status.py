"""What this machine lacks to build and to run Vulkan artifacts."""

from __future__ import annotations

import tvm_ffi

from llmc.device_plugin import load_plugin
from llmc.errors import CompileError
from llmc.targets.status import Lack
from llmc.targets.vulkan.spirv import install_hint, missing_tools

_DRIVER = (
    "install the driver of your GPU; apt-get install mesa-vulkan-drivers brings those for AMD, "
    "Intel and, slowly, any CPU"
)


def lacks() -> list[Lack]:
    """Nothing where both work; builds the plug-in where it can."""
    import tvm  # noqa: F401 - loads the libraries that the plug-in needs

    found: list[Lack] = []
    tools = missing_tools()
    if tools:
        found.append(
            Lack(
                reason=f"compiling kernels needs {' and '.join(tools)}",
                hint=install_hint(tools),
                run=False,
            )
        )
    try:
        load_plugin("vulkan")
    except CompileError as exc:
        return [*found, Lack(reason=exc.message, hint=exc.hint or "")]
    problem = str(tvm_ffi.get_global_func("llmc.vulkan.problem")())
    if problem:
        found.append(Lack(reason=problem, hint=_DRIVER, build=False))
    return found
