"""What a machine can do with a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """Something that is missing here, the command that brings it, and what cannot be done."""

    reason: str
    hint: str
    build: bool = True
    run: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """What this machine can do with a target; `reasons` say what it lacks, `hint` how to get it."""

    name: str
    can_build: bool
    can_run: bool
    reasons: list[str]
    hint: str  # empty where nothing is missing
