"""The record of perplexities, and the tables of the documentation that are made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.process import Finished
from benchmarks.quality import (
    CALIBRATED,
    KINDS,
    SCHEMES,
    Measurer,
    Row,
    Rows,
    calibration_table,
    gguf_table,
    scheme_table,
    wanted,
    with_tables,
)
from llmc.compiler.schemes import SCHEMES as KNOWN
from llmc.errors import LlmcError, UsageError


def row(model: str, scheme: str, perplexity: float, text: str | None = None, **more: object) -> Row:
    figures = {"weights_mib": 80.0, "file_mib": 79.0, "matrices": "9 q4_k"}
    return Row(model=model, scheme=scheme, text=text, perplexity=perplexity, **{**figures, **more})


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path / "quality.json")


def test_rows_are_on_disk_as_soon_as_they_are_measured(rows: Rows, tmp_path: Path) -> None:
    rows.add(row("demo", "f32", 10.0))
    rows.add(row("demo", "w8a16", 10.5))
    rows.add(row("demo", "f32", 11.0))  # measured again
    again = Rows(tmp_path / "quality.json")
    assert again.get("demo", "f32") == row("demo", "f32", 11.0)
    assert again.get("demo", "w8a8") is None
    assert len(json.loads((tmp_path / "quality.json").read_text())["rows"]) == 2


def test_a_loss_is_against_f32_and_what_is_not_measured_is_left_out(rows: Rows) -> None:
    rows.add(row("demo", "w8a16", 10.5))
    assert len(scheme_table(rows).splitlines()) == 2  # nothing to compare with
    rows.add(row("demo", "f32", 10.0))
    rows.add(row("demo", "w4a16-g64", 11.0, "licences"))
    assert scheme_table(rows).splitlines()[2:] == [
        "| `f32` | 80.0 | 10.000 |  |",
        "| `w8a16` | 80.0 | 10.500 | +5.0 % |",
        "| `w4a16-g64`, calibrated on licences | 80.0 | 11.000 | +10.0 % |",
    ]


def test_what_a_calibration_recovers_is_a_share_of_the_nats_lost(rows: Rows) -> None:
    rows.add(row("demo", "f32", 10.0))
    rows.add(row("demo", "w4a16-g64", 40.0))
    rows.add(row("demo", "w4a16-g64", 20.0, "documentation"))
    expected = "| `w4a16-g64` | documentation | 40.000 | 20.000 | 50 % |"
    assert calibration_table(rows).splitlines()[2:] == [expected]


def test_kept_formats_stand_beside_the_peer_s_figure_of_the_same_file(rows: Rows) -> None:
    rows.add(row("Q4_K_M", "llama.cpp", 20.0))
    rows.add(row("Q4_K_M", "keep-a16", 19.9))
    [line] = gguf_table(rows).splitlines()[2:]
    assert line == "| Q4_K_M | 9 q4_k | 79.0 | 80.0 | 20.000 | 19.900 (-0.5 %) |  |"


def test_tables_replace_what_stands_between_their_comments(rows: Rows) -> None:
    places = [f"<!-- table: {n} -->\nold\n<!-- end: {n} -->" for n in quality.TABLES]
    page = "\n\n".join(["before", *places, "after"])
    made = with_tables(page, rows)
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("\n\nafter")
    assert with_tables(made, rows) == made
    with pytest.raises(UsageError, match="no place for the table 'schemes'"):
        with_tables("nothing", rows)


def test_every_row_is_of_a_scheme_that_exists(tmp_path: Path) -> None:
    measurer = Measurer(peer=LlamaCpp(folder=tmp_path), work=tmp_path, threads=1)
    schemes = {key[1] for key, _ in wanted(measurer)} - {"llama.cpp"}
    assert schemes <= set(KNOWN)
    # A name for keep-a8 or keep-a16, and what CPUs refuse.
    assert set(KNOWN) - schemes == {"keep", "fp8"}
    assert len({key for key, _ in wanted(measurer)}) == len(wanted(measurer))
    assert len(SCHEMES) + len(CALIBRATED) + 3 * len(KINDS) + 1 == len(wanted(measurer))


def test_the_peer_s_perplexity_is_read_from_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["ETA 0.1 minutes\nFinal estimate: PPL = 23.0911 +/- 1.08722\n", "out of context"]

    def run(command: list[object]) -> Finished:
        return Finished(
            command="llama-perplexity",
            stdout="",
            stderr=said.pop(0),
            seconds=1.0,
            peak_memory_mib=1.0,
        )

    monkeypatch.setattr("benchmarks.llama_cpp.run", run)
    peer = LlamaCpp(folder=tmp_path)
    assert peer.perplexity(tmp_path / "m", tmp_path / "t", threads=1, window=512) == 23.0911
    with pytest.raises(LlmcError, match="printed no perplexity"):
        peer.perplexity(tmp_path / "m", tmp_path / "t", threads=1, window=512)
