"""A record as a table on the terminal and as a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import METRICS, Metric, Record, spread
from llmc.cli.console import console, table

OWN = "llmc"
TIE = 0.15  # figures that differ by less are equal: what such machines vary from run to run

_COLUMNS = (
    *("figure", f">{OWN}", ">best peer", "which", ">ratio", ">floor", f">{OWN} of floor"),
    ">of bandwidth beside",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one case, as shown."""

    metric: str
    own: str
    peer: str
    peer_name: str
    ratio: float | None  # above 1: ours is better
    floor: str
    share: str
    beside: str

    def cells(self) -> list[str]:
        """In the order of the columns."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        floor = (self.floor, self.share, self.beside)
        return [self.metric, self.own, self.peer, self.peer_name, ratio, *floor]


def rows(record: Record, case: str) -> list[Row]:
    """The metrics of a case that were measured."""
    measured = {s.metric for s in record.samples if s.case == case}
    return [_row(record, case, m) for name, m in METRICS.items() if name in measured]


def _row(record: Record, case: str, metric: Metric) -> Row:
    own = record.values(case, metric.name, OWN)
    peer_name = record.best_peer(case, metric.name, OWN)
    peer = record.values(case, metric.name, peer_name) if peer_name else []
    floor = record.cases[case].get("floors", {}).get(metric.name)
    ratio = share = None
    if own and peer:
        ratio = _better(metric, spread(own)[0], spread(peer)[0])
    if own and floor:
        # What is left of the way to the floor: 100 % is the floor itself.
        share = _better(metric, spread(own)[0], floor)
    return Row(
        metric=f"{metric.title}, {metric.unit}",
        own=_figure(own),
        peer=_figure(peer),
        peer_name=peer_name or "",
        ratio=ratio,
        floor="" if floor is None else _number(floor),
        share="" if share is None else f"{share:.0%}",
        beside=_figure(record.values(case, metric.beside, OWN), "{:.0%}".format),
    )


def _better(metric: Metric, own: float, other: float) -> float:
    return own / other if metric.more_is_better else other / own


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure(values: list[float], show: Callable[[float], str] = _number) -> str:
    if not values:
        return ""
    median, least, most = map(show, spread(values))
    return median if len(values) == 1 else f"{median} ({least} … {most})"


def print_record(record: Record) -> None:
    """The tables on a terminal, coloured where the difference is more than a tie."""
    for line in _preface(record):
        console().print(line, markup=False, soft_wrap=True)
    for name, case in record.cases.items():
        shown = table(*_COLUMNS, title=case["title"])
        for row in rows(record, name):
            shown.add_row(*row.cells(), style=_style(row.ratio))
        console().print(shown)


def _style(ratio: float | None) -> str:
    if ratio is None or 1 / (1 + TIE) < ratio < 1 + TIE:
        return ""
    return "green" if ratio > 1 else "red"


def markdown(record: Record, plots: dict[str, Path]) -> str:
    """The page; `plots` are images by case, relative to it."""
    parts = [
        "# Speed on a CPU",
        "<!-- Made by `make bench-cpu` from cpu.json: change that, not this. -->",
        *_preface(record),
    ]
    for name, case in record.cases.items():
        parts += [f"## {case['title']}", _table(rows(record, name))]
        if name in plots:
            parts.append(f"![Roofline of {case['title']}]({plots[name]})")
    if record.failures:
        parts += ["## Runs that failed", "\n".join(["```", *record.failures, "```"])]
    return "\n\n".join([*parts, "## Commands", _commands(record)]) + "\n"


def _preface(record: Record) -> list[str]:
    """What the figures mean, in paragraphs."""
    setting, limits = record.setting, record.limits
    peaks = ", ".join(
        f"{name} {value / 1e9:,.0f} Gop/s" for name, value in limits["operations_per_s"].items()
    )
    return [
        *(["Interrupted: some figures are missing."] if not record.complete else []),
        f"{setting['machine']}, {setting['threads']} threads, {setting['created']}. "
        f"{'; '.join(setting['engines'])}. "
        f"n = {setting['repeat']} rounds in which the programs take turns, {setting['gen_tokens']} "
        "tokens decoded a sequence; after a warm-up in each process, medians (least … most). Load "
        f"before a run: at most {_load(record):.1f}.",
        f"Limits of the machine, measured beside: memory {limits['memory_bytes_per_s'] / 1e9:.1f} "
        f"GB/s read, shared caches {limits['cache_bytes_per_s'] / 1e9:.1f} GB/s, {peaks}.",
        f"A ratio above 1 means that llmc is better; within {TIE:.0%} it is a tie. Of all "
        "peers, and of llama.cpp with and without flash attention, the best is shown. The floor is "
        "what reading every weight once a step, or doing every product at the processor's peak, "
        "takes at least: at the best rates of the whole run. Beside it stands at what share of the "
        "memory's bandwidth weights, keys and values were read, as each process measured it after "
        "its own figures.",
    ]


def _load(record: Record) -> float:
    return max((s.load for s in record.samples), default=0.0)


def _table(shown: list[Row]) -> str:
    head = [column.removeprefix(">") for column in _COLUMNS]
    rule = ["---:" if column.startswith(">") else "---" for column in _COLUMNS]
    return "\n".join(f"| {' | '.join(c)} |" for c in [head, rule, *(r.cells() for r in shown)])


def _commands(record: Record) -> str:
    """Each command of the first round once, for every case."""
    return "\n".join(["```", *dict.fromkeys(s.command for s in record.samples), "```"])
