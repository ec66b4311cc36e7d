"""What was measured, kept on disk after every measurement, so that an interruption costs little."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import UsageError

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measured quantity."""

    name: str
    title: str
    unit: str
    more_is_better: bool = True

    @property
    def beside(self) -> str:
        """The metric that is this one's share of the bandwidth which its process measured after
        it: a shared machine's memory is not as fast all the time.
        """
        return f"{self.name}-beside"


METRICS = {
    m.name: m
    for m in (
        Metric(name="prefill", title="prefill, 512 tokens", unit="tokens/s"),
        Metric(name="decode-0", title="decode, batch 1, depth 0", unit="tokens/s"),
        Metric(name="decode-1024", title="decode, batch 1, depth 1024", unit="tokens/s"),
        Metric(name="decode-4096", title="decode, batch 1, depth 4096", unit="tokens/s"),
        Metric(name="batch-4", title="decode, batch 4, total", unit="tokens/s"),
        Metric(name="batch-16", title="decode, batch 16, total", unit="tokens/s"),
        Metric(name="memory", title="peak memory", unit="MiB", more_is_better=False),
        Metric(name="start", title="process start to first token", unit="s", more_is_better=False),
    )
}


BESIDE = {
    m.beside: Metric(name=m.beside, title=f"{m.title}, of the bandwidth beside", unit="")
    for m in METRICS.values()
    if m.title.startswith("decode")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One figure of one run."""

    case: str
    metric: str  # a key of METRICS or BESIDE
    engine: str
    value: float
    round: int
    command: str
    load: float  # processes that wanted to run in the minute before


@dataclass(slots=True, kw_only=True)
class Record:
    """Everything a page is made from."""

    schema_version: int = SCHEMA_VERSION
    setting: dict[str, Any]  # machine, versions, options
    limits: dict[str, Any]  # of the machine, as measured: see llmc.cli.kernel_cost.Limits
    cases: dict[str, dict[str, Any]]  # by name: title, model, floors by metric
    samples: list[Sample] = field(default_factory=list)
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by case: steps
    failures: list[str] = field(default_factory=list)  # runs that gave no figure, and why
    complete: bool = False

    def values(self, case: str, metric: str, engine: str) -> list[float]:
        """The figures of all rounds."""
        return [
            s.value for s in self.samples if (s.case, s.metric, s.engine) == (case, metric, engine)
        ]

    def engines(self) -> list[str]:
        """In the order they were first measured."""
        return list(dict.fromkeys(s.engine for s in self.samples))

    def best_peer(self, case: str, metric: str, own: str) -> str | None:
        """The engine with the best median beside `own`; None where there is none."""
        medians = {
            engine: statistics.median(values)
            for engine in self.engines()
            if engine != own and (values := self.values(case, metric, engine))
        }
        if not medians:
            return None
        pick = max if METRICS[metric].more_is_better else min
        return pick(medians, key=lambda engine: medians[engine])

    def save(self, path: Path) -> None:
        """Writes all of it at once: a reader never sees half."""
        partial = path.with_suffix(".partial")
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads what `save` wrote; UsageError where it is something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            samples = [Sample(**sample) for sample in data.pop("samples")]
            record = cls(samples=samples, **data)
        except (OSError, ValueError, TypeError, KeyError) as exc:
            raise UsageError(f"{path}: no record of measurements: {exc}") from exc
        if record.schema_version != SCHEMA_VERSION:
            raise UsageError(
                f"{path}: schema {record.schema_version}, expected {SCHEMA_VERSION}",
                hint="measure again",
            )
        return record


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """(median, least, most)."""
    values = list(values)
    return statistics.median(values), min(values), max(values)


def load_average() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]
