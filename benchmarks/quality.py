"""`python -m benchmarks.quality`: what each weight format costs in perplexity, beside llama.cpp.

Every figure is kept as soon as it is there (`docs/benchmarks/quality.json`), and rows that are kept
are not measured again, so that an interrupted run goes on where it stopped. The tables of
`docs/quantization.md` are made from the record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import psutil
from gguf import GGUFReader

from benchmarks import llama_cpp
from benchmarks.cli import cache_option, explained, llama_cpp_option
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.models import REPOSITORY, demo_gguf, llmc_command
from benchmarks.process import run
from llmc.cli.console import console
from llmc.errors import LlmcError, UsageError

WINDOW = 512
LICENCES = Path("/usr/share/common-licenses")  # of Debian
SCORED = ("GPL-3", "LGPL-2.1", "GFDL-1.3")
OTHER_LICENCES = ("Apache-2.0", "MPL-1.1", "MPL-2.0", "Artistic", "CC0-1.0", "BSD")
SCHEMES = (
    *("f32", "keep-a16", "keep-a8", "bf16", "f16", "w8a16", "w8a8"),
    *(f"w4{a}-g{group}{kind}" for kind in ("", "-asym") for a in ("a16", "a8")
      for group in (32, 64, 128)),
)  # fmt: skip
CALIBRATED = tuple(
    (scheme, text)
    for text in ("documentation", "licences")
    for scheme in ("w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-g64-asym")
)
KINDS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL"),
    *("Q3_K_M", "Q2_K"),
)
KEPT = ("keep-a16", "keep-a8")
RECORD = REPOSITORY / "docs" / "benchmarks" / "quality.json"
PAGE = REPOSITORY / "docs" / "quantization.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure. weights_mib is None for llama.cpp."""

    model: str  # "demo", or the kind of a GGUF file made from it
    scheme: str  # of `llmc compile`, or "llama.cpp"
    text: str | None = None  # that calibrated it
    perplexity: float
    standard_error: float | None = None
    num_scored_tokens: int | None = None
    weights_mib: float | None = None
    file_mib: float | None = None
    matrices: str | None = None  # types of a GGUF file's matrices


Key = tuple[str, str, str | None]


class Rows:
    """The measured rows in a file, in the order of measurement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        self._rows = {_key(row): row for row in (Row(**entry) for entry in rows)}

    def get(self, model: str, scheme: str, text: str | None = None) -> Row | None:
        """The row of these, or None before it is measured."""
        return self._rows.get((model, scheme, text))

    def add(self, row: Row) -> None:
        """Keeps a row; the file is written anew."""
        self._rows[_key(row)] = row
        entries = [dataclasses.asdict(r) for r in self._rows.values()]
        unfinished = self._path.with_suffix(".partial")
        unfinished.write_text(json.dumps({"rows": entries}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._path)


def _key(row: Row) -> Key:
    return row.model, row.scheme, row.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurer:
    """Measures single rows; files lie in the folder `work`."""

    peer: LlamaCpp
    work: Path
    threads: int

    def scored_text(self) -> Path:
        """The text whose tokens are predicted."""
        return self._text("scored", "\n".join(_licence(name) for name in SCORED))

    def calibration_text(self, name: str) -> Path:
        """A text of another kind than the scored one, or of the same kind by other authors."""
        if name == "licences":
            return self._text(name, "\n".join(_licence(n) for n in OTHER_LICENCES))
        from pydoc_data.topics import topics

        return self._text(name, "\n\n".join(topics.values()))

    def gguf(self, kind: str) -> Path:
        """The demo's weights as float32 (kind F32), or these quantized by llama.cpp."""
        out = self.work / f"{kind}.gguf"
        if not out.is_file():
            source = demo_gguf() if kind == "F32" else self.gguf("F32")
            self.peer.quantize(source, out, kind)
        return out

    def own(self, model: str, scheme: str, text: str | None) -> Row:
        """Compiles and scores: one row of llmc."""
        source = demo_gguf() if model == "demo" else self.gguf(model)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            artifact = Path(folder) / "artifact"
            options = ["--quant", scheme, "--target", "cpu", "-o", str(artifact), "--json"]
            if text is not None:
                options += ["--calibrate", str(self.calibration_text(text))]
            run([*llmc_command(), "compile", source, *options], cwd=REPOSITORY)
            manifest = json.loads((artifact / "llmc.json").read_text(encoding="utf-8"))
            options = ["--text", str(self.scored_text()), "--window", str(WINDOW), "--json"]
            scored = run([*llmc_command(), "eval", artifact, *options], cwd=REPOSITORY)
        figures = json.loads(scored.stdout)
        return Row(
            model=model,
            scheme=scheme,
            text=text,
            perplexity=figures["perplexity"],
            standard_error=figures["standard_error"],
            num_scored_tokens=figures["num_scored_tokens"],
            weights_mib=manifest["memory"]["weights_bytes"] / 2**20,
        )

    def of_peer(self, model: str) -> Row:
        """llama.cpp's figure of a file."""
        file = self.gguf(model)
        value = self.peer.perplexity(file, self.scored_text(), threads=self.threads, window=WINDOW)
        tensors = GGUFReader(file).tensors
        types = Counter(t.tensor_type.name.lower() for t in tensors if len(t.shape) > 1)
        return Row(
            model=model,
            scheme="llama.cpp",
            perplexity=value,
            file_mib=sum(int(t.n_bytes) for t in tensors) / 2**20,
            matrices=", ".join(f"{count} {name}" for name, count in types.most_common()),
        )

    def _text(self, name: str, text: str) -> Path:
        path = self.work / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        return path


def _licence(name: str) -> str:
    try:
        return (LICENCES / name).read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(
            f"{LICENCES / name} cannot be read: {exc.strerror}", hint="measure on a Debian system"
        ) from exc


def wanted(measurer: Measurer) -> list[tuple[Key, Callable[[], Row]]]:
    """Every row of the tables with what measures it."""
    keys: list[Key] = [("demo", scheme, None) for scheme in SCHEMES]
    keys += [("demo", scheme, text) for scheme, text in CALIBRATED]
    keys += [(kind, "llama.cpp", None) for kind in ("F32", *KINDS)]
    keys += [(kind, scheme, None) for kind in KINDS for scheme in KEPT]
    return [
        (key, partial(measurer.of_peer, key[0]))
        if key[1] == "llama.cpp"
        else (key, partial(measurer.own, *key))
        for key in keys
    ]


def scheme_table(rows: Rows) -> str:
    """What `llmc compile`'s own schemes cost."""
    lines = ["| scheme | weights, MiB | perplexity | against `f32` |", "|---|---:|---:|---:|"]
    reference = rows.get("demo", "f32")
    for scheme, text in [*((s, None) for s in SCHEMES), *CALIBRATED]:
        row = rows.get("demo", scheme, text)
        if row is None or reference is None:
            continue
        name = f"`{scheme}`" + (f", calibrated on {text}" if text else "")
        loss = _percent(row.perplexity, reference.perplexity) if row is not reference else ""
        lines.append(f"| {name} | {row.weights_mib:.1f} | {row.perplexity:.3f} | {loss} |")
    return "\n".join(lines)


def calibration_table(rows: Rows) -> str:
    """How much of the nats that rounding loses a calibration text takes back."""
    lines = [
        "| scheme | text | rounded | calibrated | recovered |",
        "|---|---|---:|---:|---:|",
    ]
    reference = rows.get("demo", "f32")
    for scheme, text in CALIBRATED:
        rounded, row = rows.get("demo", scheme), rows.get("demo", scheme, text)
        if rounded is None or row is None or reference is None:
            continue
        lost = math.log(rounded.perplexity / reference.perplexity)
        left = math.log(row.perplexity / reference.perplexity)
        figures = (
            f"{rounded.perplexity:.3f} | {row.perplexity:.3f} | {100 * (1 - left / lost):.0f} %"
        )
        lines.append(f"| `{scheme}` | {text} | {figures} |")
    return "\n".join(lines)


def gguf_table(rows: Rows) -> str:
    """Kept GGUF formats beside llama.cpp's figures of the same files."""
    lines = [
        "| file | its matrices | file, MiB | weights, MiB | llama.cpp | `keep-a16` | `keep-a8` |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        peer = rows.get(kind, "llama.cpp")
        own = [rows.get(kind, scheme) for scheme in KEPT]
        measured = [row for row in own if row is not None]
        if peer is None or not measured:
            continue
        figures = [
            f"{row.perplexity:.3f} ({_percent(row.perplexity, peer.perplexity)})" if row else ""
            for row in own
        ]
        sizes = f"{peer.file_mib:.1f} | {measured[0].weights_mib:.1f}"
        ours = " | ".join(figures)
        lines.append(f"| {kind} | {peer.matrices} | {sizes} | {peer.perplexity:.3f} | {ours} |")
    return "\n".join(lines)


def _percent(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f} %"


TABLES: dict[str, Callable[[Rows], str]] = {
    "schemes": scheme_table,
    "calibration": calibration_table,
    "gguf": gguf_table,
}


def with_tables(page: str, rows: Rows) -> str:
    """The page with each table between its two comments; UsageError where one is missing."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        before, found, rest = page.partition(begin)
        _old, closed, after = rest.partition(end)
        if not found or not closed:
            raise UsageError(f"the page has no place for the table {name!r}: {begin.strip()}")
        page = before + begin + table(rows) + end + after
    return page


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--only", default="", help="Measure rows whose model/scheme/text contains this.")
@click.option("--again", is_flag=True, help="Measure rows that the record has, too.")
@click.option("--page-only", is_flag=True, help="Make the tables from the record again.")
@cache_option
@llama_cpp_option
@click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RECORD,
    show_default="docs/benchmarks/quality.json",
    help="Where the figures go.",
)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Of llama.cpp.")
def quality(
    only: str,
    again: bool,
    page_only: bool,
    cache: Path,
    peer_folder: Path | None,
    record: Path,
    threads: int | None,
) -> None:
    """Measures perplexities and fills in the tables of docs/quantization.md."""
    talk = console(err=True)
    rows = Rows(record)
    if not page_only:
        work = cache / "quality"
        work.mkdir(parents=True, exist_ok=True)
        peer = LlamaCpp.find(peer_folder) if peer_folder else llama_cpp.build(cache, talk.print)
        measurer = Measurer(
            peer=peer, work=work, threads=threads or psutil.cpu_count(logical=False) or 1
        )
        for key, measure in wanted(measurer):
            name = "/".join(part for part in key if part)
            if only not in name or (rows.get(*key) is not None and not again):
                continue
            try:
                row = measure()
            except LlmcError as exc:  # the others are worth having
                talk.print(f"[red]{name}: {exc}")
                continue
            rows.add(row)
            talk.print(f"{name}: {row.perplexity:.4f}")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    explained(quality, "python -m benchmarks.quality")
