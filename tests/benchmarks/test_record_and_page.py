"""The record of a comparison and the page made from it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import session as session_module
from benchmarks.engine import Plan
from benchmarks.models import CASES, Files
from benchmarks.plots import plot_roofline
from benchmarks.process import Finished
from benchmarks.record import Record, Sample
from benchmarks.report import markdown, rows
from benchmarks.scenarios import Scenario
from benchmarks.session import Session, publish
from llmc.cli.kernel_cost import Limits
from llmc.errors import LlmcError, UsageError

LIMITS = {
    "memory_bytes_per_s": 4e10,
    "cache_bytes_per_s": 1e11,
    "operations_per_s": {"int8": 2e12, "f32": 5e11},
}
SETTING = {
    "created": "2026-01-01",
    "machine": "a machine",
    "threads": 2,
    "repeat": 3,
    "gen_tokens": 32,
    "engines": ["llmc 0, TVM 0", "a peer 7"],
}


def record(**changes: object) -> Record:
    cases = {"smollm2": {"title": "SmolLM2", "floors": {"decode-0": 400.0, "memory": 90.0}}}
    fields = {"setting": SETTING, "limits": LIMITS, "cases": cases, **changes}
    return Record(**fields)


def sample(metric: str, engine: str, value: float, round: int = 0) -> Sample:
    return Sample(
        case="smollm2",
        metric=metric,
        engine=engine,
        value=value,
        round=round,
        command=f"{engine} --measure {metric}",
        load=0.25,
    )


def test_the_peer_to_beat_is_the_better_of_its_variants_by_each_metric() -> None:
    samples = [
        sample("decode-0", "llmc", 300),
        *(sample("decode-0-beside", "llmc", v) for v in (0.9, 0.914, 0.8)),
        *(sample("decode-0", "llama.cpp -fa 0", v) for v in (240, 250, 260)),
        *(sample("decode-0", "llama.cpp -fa 1", v) for v in (100, 110, 900)),  # one lucky run
        sample("memory", "llmc", 180),
        sample("memory", "llama.cpp -fa 0", 250),
        sample("memory", "llama.cpp -fa 1", 200),
    ]
    measured = record(samples=samples)
    assert measured.best_peer("smollm2", "decode-0", "llmc") == "llama.cpp -fa 0"
    assert measured.best_peer("smollm2", "memory", "llmc") == "llama.cpp -fa 1"
    decode, memory = rows(measured, "smollm2")
    assert decode.cells()[1:] == [
        *("300", "250 (240 … 260)", "llama.cpp -fa 0", "1.20", "400", "75%"),
        "90% (80% … 91%)",
    ]
    assert memory.ratio == pytest.approx(200 / 180)  # less memory is better
    assert memory.share == "50%"


def test_a_metric_without_a_peer_or_without_ours_is_shown_as_far_as_it_goes() -> None:
    samples = [sample("decode-0", "llmc", 200), sample("prefill", "llama.cpp -fa 0", 1500)]
    prefill, decode = rows(record(samples=samples), "smollm2")
    assert decode.cells()[1:] == ["200", "", "", "", "400", "50%", ""]
    assert prefill.cells()[1:] == ["", "1,500", "llama.cpp -fa 0", "", "", "", ""]


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = record(samples=[sample("start", "llmc", 0.5)], complete=True)
    saved.save(tmp_path / "cpu.json")
    assert Record.load(tmp_path / "cpu.json") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"samples": [{"case": "x"}]}'])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(UsageError, match=r"cpu\.json"):
        Record.load(tmp_path / "cpu.json")


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    record(schema_version=99).save(tmp_path / "cpu.json")
    with pytest.raises(UsageError, match="schema 99"):
        Record.load(tmp_path / "cpu.json")


def test_the_page_states_machine_limits_commands_and_what_is_missing() -> None:
    measured = record(samples=[sample("decode-0", "llmc", 200)])
    page = markdown(measured, {"smollm2": Path("roofline-smollm2.svg")})
    for shown in (
        *(
            "a machine, 2 threads",
            "TVM 0; a peer 7.",
            "memory 40.0 GB/s",
            "int8 2,000 Gop/s",
            "Interrupted",
        ),
        *("| decode, batch 1, depth 0, tokens/s | 200 |", "llmc --measure decode-0"),
        "![Roofline of SmolLM2](roofline-smollm2.svg)",
    ):
        assert shown in page
    measured.complete = True
    assert "Interrupted" not in markdown(measured, {})


STEP = {
    "entry_point": "step_1",
    "num_tokens": 1,
    "kernels_ms": 0.1,
    "kernels": [
        {
            "name": "gemv_7",
            "operations": 2e6,
            "memory_bytes": 5e5,
            "us_per_call": 25.0,
            "ms_per_step": 0.1,
        },
        {
            "name": "norm_1",
            "operations": 0,
            "memory_bytes": 0,
            "us_per_call": 1.0,
            "ms_per_step": 0.0,
        },
    ],
}


def test_a_roofline_names_kernels_that_compute_and_every_ceiling(tmp_path: Path) -> None:
    out = tmp_path / "roofline.svg"
    plot_roofline("SmolLM2", [STEP], LIMITS, out)
    text = out.read_text()
    # Letters are drawn as shapes; what is written stands in comments.
    for shown in ("SmolLM2", "gemv_7", "int8 peak", "f32 peak", "memory", "step_1, T = 1"):
        assert f"<!-- {shown} -->" in text
    assert "norm_1" not in text


FASTER = Limits(
    memory_bytes_per_s=5e10, cache_bytes_per_s=1e9, operations_per_s={"int8": 1e12, "f32": 6e11}
)


def session(out: Path, shown: Record) -> Session:
    return Session(
        record=shown,
        manifests={},
        engines=[
            SimpleNamespace(name=n, folder=Path("/programs")) for n in ("ours", "peer0", "peer1")
        ],
        plan=Plan(threads=2, gen_tokens=8),
        out=out,
        cache=Path("/cache"),
        talk=Console(file=io.StringIO()),
    )


FILES = Files(case=CASES["smollm2"], gguf=Path("/cache/m.gguf"), artifact=Path("/cache/artifact"))


def fake_scenarios(
    runs: list[str], *, fail_at: int | None = None, error: BaseException | None = None
):
    """Two scenarios whose runs are only noted; run number `fail_at` raises `error`."""

    def finish(name: str) -> Finished:
        if len(runs) == fail_at and error is not None:
            runs.append("")
            raise error
        runs.append(name)
        command = f"/programs/{name} /cache/m.gguf"
        return Finished(command=command, stdout="", seconds=1.0, peak_memory_mib=1.0)

    def scenario(metric: str) -> Scenario:
        return Scenario(
            name=metric,
            measure=lambda engine, files, plan: (finish(f"{engine.name}-{metric}"), {metric: 2.0}),
        )

    return lambda case: [scenario("decode-0"), scenario("start")]


def test_the_programs_take_turns_at_every_figure(tmp_path: Path, monkeypatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(session_module, "scenarios", fake_scenarios(runs))
    monkeypatch.setattr(session_module, "profile", lambda files, plan: ([STEP], [FASTER]))
    monkeypatch.setattr(session_module, "demo_gguf", lambda: Path("/demo/model.gguf"))
    comparison = session(tmp_path, record())
    comparison.measure([FILES], 2)
    one_round = [f"{who}-{m}" for m in ("decode-0", "start") for who in ("ours", "peer0", "peer1")]
    assert runs == one_round * 2
    assert comparison.record.complete
    assert {s.round for s in comparison.record.samples} == {0, 1}
    # A machine that was busy when its limits were measured first can do what it did later.
    assert comparison.record.limits == {
        "memory_bytes_per_s": 5e10,
        "cache_bytes_per_s": 1e11,
        "operations_per_s": {"int8": 2e12, "f32": 6e11},
    }
    # Commands are shown without this machine's folders.
    assert comparison.record.samples[0].command == "ours-decode-0 m.gguf"


def test_a_failed_run_is_noted_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    runs: list[str] = []
    failure = LlmcError("`/programs/peer1-decode-0` ended with -11: bang")
    monkeypatch.setattr(session_module, "scenarios", fake_scenarios(runs, fail_at=2, error=failure))
    monkeypatch.setattr(session_module, "profile", lambda files, plan: ([STEP], [FASTER]))
    monkeypatch.setattr(session_module, "demo_gguf", lambda: Path("/demo/model.gguf"))
    comparison = session(tmp_path, record())
    comparison.measure([FILES], 1)
    publish(comparison.record, tmp_path)
    assert runs == [
        "ours-decode-0",
        "peer0-decode-0",
        "",
        "ours-start",
        "peer0-start",
        "peer1-start",
    ]
    assert len(comparison.record.samples) == 5
    assert "`peer1-decode-0` ended with -11: bang" in (tmp_path / "cpu.md").read_text()


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    runs: list[str] = []
    fakes = fake_scenarios(runs, fail_at=4, error=KeyboardInterrupt())
    monkeypatch.setattr(session_module, "scenarios", fakes)
    monkeypatch.setattr(session_module, "demo_gguf", lambda: Path("/demo/model.gguf"))
    comparison = session(tmp_path, record())
    with pytest.raises(KeyboardInterrupt):
        comparison.measure([FILES], 2)
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert len(kept["samples"]) == 4
    assert kept["complete"] is False
    publish(comparison.record, tmp_path)
    assert "Interrupted" in (tmp_path / "cpu.md").read_text()
    assert "decode, batch 1" in capsys.readouterr().out
