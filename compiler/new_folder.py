"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmc.artifact import MANIFEST_FILE
from llmc.errors import CompileError, UsageError


@contextmanager
def new_folder(where: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `where` that takes its place when all went well, and vanishes otherwise.

    `force` replaces an artifact; whatever else exists there is never touched. Raises UsageError
    where `where` cannot be written or exists, CompileError where writing fails later.
    """
    if where.exists() and not force:
        raise UsageError(f"{where} exists", hint="--force overwrites it")
    if where.exists() and not (where / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{where} is not an artifact: it will not be overwritten", hint="choose another folder"
        )
    missing = [p for p in (where.parent, *where.parent.parents) if not p.exists()]
    folder: Path | None = None
    try:
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            folder = _beside(where)  # known before it exists: a signal may follow at once
            folder.mkdir(mode=0o700)
        except OSError as exc:
            raise UsageError(
                f"{where} cannot be written: {exc.filename}: {exc.strerror}",
                hint="choose another folder with -o",
            ) from exc
        try:
            yield folder
            folder.chmod(0o777 & ~_umask())
            _move(folder, where)
        except OSError as exc:
            raise CompileError(f"writing {where} failed: {exc}") from exc
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:  # the deepest first; those that are not empty stay
            with suppress(OSError):
                parent.rmdir()


def _move(folder: Path, where: Path) -> None:
    """Renames `folder` to `where`; what was there is deleted only when the new one is in place."""
    if not where.exists():
        folder.rename(where)
        return
    old = _beside(where)
    where.rename(old)
    try:
        folder.rename(where)
    except BaseException:
        old.rename(where)
        raise
    shutil.rmtree(old)


def _beside(where: Path) -> Path:
    """A hidden name that nothing has."""
    return where.parent / f".{where.name}-{secrets.token_hex(8)}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
