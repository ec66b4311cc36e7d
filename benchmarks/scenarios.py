"""What is run for every figure, by each engine in its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.engine import Engine, Measured, Plan
from benchmarks.models import Case, Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run of each engine that gives one or two figures."""

    name: str
    measure: Callable[[Engine, Files, Plan], Measured]


def scenarios(case: Case) -> list[Scenario]:
    """Those that are measured for a case."""
    return [
        Scenario(name="prefill", measure=lambda engine, *run: engine.prefill(*run)),
        *(_decode(depth) for depth in case.depths),
        Scenario(name="batches", measure=lambda engine, *run: engine.batches(*run)),
        Scenario(name="start", measure=lambda engine, *run: engine.start(*run)),
    ]


def _decode(depth: int) -> Scenario:
    return Scenario(name=f"decode-{depth}", measure=lambda engine, *run: engine.decode(*run, depth))
