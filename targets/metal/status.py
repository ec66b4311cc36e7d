"""What this machine lacks to build and to run Metal artifacts."""

from __future__ import annotations

import platform

from llmc.errors import CompileError
from llmc.targets.cpu.link import check_compiler
from llmc.targets.metal.target import PLATFORM
from llmc.targets.status import Lack


def lacks() -> list[Lack]:
    """Nothing where both work: on a Mac of Apple's own processors."""
    found: list[Lack] = []
    try:
        check_compiler(PLATFORM)
    except CompileError as exc:
        found.append(Lack(reason=exc.message, hint=exc.hint or "", run=False))
    if not PLATFORM.is_host:
        here = f"{platform.system()} {platform.machine()}"
        found.append(
            Lack(
                reason=f"Metal runs on macOS with Apple's processors; this is {here}",
                hint="copy the artifact to such a Mac",
                build=False,
            )
        )
    return found
