"""The rounds: the programs take turns at every figure, and each figure is kept at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.engine import Engine, Figures, Plan
from benchmarks.floors import floors
from benchmarks.models import CASES, Files, demo_gguf, llmc_command
from benchmarks.own import profile
from benchmarks.plots import plot_roofline
from benchmarks.process import Finished
from benchmarks.record import BESIDE, METRICS, Record, Sample, load_average
from benchmarks.report import markdown, print_record
from benchmarks.scenarios import Scenario, scenarios
from llmc.artifact import Manifest
from llmc.cli.kernel_cost import Limits
from llmc.errors import LlmcError

RECORD_FILE, PAGE_FILE = "cpu.json", "cpu.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One run of the whole comparison; its record grows."""

    record: Record
    manifests: Mapping[str, Manifest]  # of the artifacts, by case
    engines: Sequence[Engine]
    plan: Plan
    out: Path
    cache: Path
    talk: Console

    def measure(self, files: Sequence[Files], repeat: int) -> None:
        """All rounds, then a profile of each artifact."""
        self._set_floors()
        for number in range(repeat):
            for one in files:
                for scenario in scenarios(one.case):
                    self.talk.print(
                        f"round {number + 1} of {repeat}: {one.case.title}, {scenario.name}"
                    )
                    self._take_turns(one, scenario, number)
        for one in files:
            self.talk.print(f"profile: {one.case.title}")
            with self._noting_failure():
                self.record.profiles[one.case.name], limits = profile(one, self.plan)
                for measured in limits:
                    self._raise_limits(measured)
        self.record.complete = True

    def _set_floors(self) -> None:
        limits = Limits(**self.record.limits)
        for name, manifest in self.manifests.items():
            self.record.cases[name]["floors"] = floors(
                manifest, limits, depths=CASES[name].depths, gen=self.plan.gen_tokens
            )

    def _raise_limits(self, measured: Limits) -> None:
        """What the machine did once it can do: every limit is the best that was seen."""
        known = Limits(**self.record.limits)
        rates = known.operations_per_s.items()
        self.record.limits = dataclasses.asdict(
            Limits(
                memory_bytes_per_s=max(known.memory_bytes_per_s, measured.memory_bytes_per_s),
                cache_bytes_per_s=max(known.cache_bytes_per_s, measured.cache_bytes_per_s),
                operations_per_s={n: max(v, measured.peak(n)) for n, v in rates},
            )
        )
        self._set_floors()

    def _take_turns(self, files: Files, scenario: Scenario, number: int) -> None:
        for engine in self.engines:
            load = load_average()
            with self._noting_failure():
                finished, figures = scenario.measure(engine, files, self.plan)
                run = (files.case.name, engine.name, number)
                samples = self._samples(run, load, finished, figures)
                self.record.samples += samples
                self._say_samples(samples)
            self.record.save(self.out / RECORD_FILE)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Goes on after a run that failed: the others' figures must not be lost to it."""
        try:
            yield
        except LlmcError as exc:
            message = self._shown(exc.message)
            self.record.failures.append(message)
            self.talk.print(message, style="red", markup=False)

    def _samples(
        self, run: tuple[str, str, int], load: float, finished: Finished, figures: Figures
    ) -> list[Sample]:
        """The figures of a run (case, engine, round)."""
        case, engine, number = run
        return [
            Sample(
                case=case,
                metric=metric,
                engine=engine,
                value=value,
                round=number,
                command=self._shown(finished.command),
                load=load,
            )
            for metric, value in figures.items()
        ]

    def _say_samples(self, samples: list[Sample]) -> None:
        if samples:
            self.talk.print(f"  $ {samples[0].command}", markup=False, style="dim")
        for sample in samples:
            metric = {**METRICS, **BESIDE}[sample.metric]
            self.talk.print(
                f"    {sample.engine}: {metric.title}: {sample.value:,.4g} {metric.unit}",
                markup=False,
            )

    def _shown(self, command: str) -> str:
        """A command as anyone could type it: without the folders of this machine."""
        for path, name in (
            (" ".join(llmc_command()), "llmc"),
            *((f"{engine.folder}/", "") for engine in self.engines),
            (f"{demo_gguf().parent}/", ""),
            (f"{self.cache}/", ""),
        ):
            command = command.replace(path, name)
        return command


def publish(record: Record, out: Path) -> None:
    """Writes record, plots and page, and prints the tables: of what there is."""
    record.save(out / RECORD_FILE)
    plots = {}
    for name, steps in record.profiles.items():
        plots[name] = Path(f"roofline-{name}.svg")
        plot_roofline(record.cases[name]["title"], steps, record.limits, out / plots[name])
    (out / PAGE_FILE).write_text(markdown(record, plots), encoding="utf-8")
    print_record(record)
