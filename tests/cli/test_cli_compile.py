"""`llmc compile` over a compiler that only reports: what is shown, written and passed on."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from toy_artifact import write_artifact


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """Replaces the compiler; gives the list of its calls."""
    calls: list[dict] = []

    def compile_model(source, *, on_phase, **options):
        calls.append({"source": source, **options})

        def event(name: str, status: str, **more: object) -> types.SimpleNamespace:
            values = {"seconds": 0.0, "detail": "", "fraction": None, **more}
            return types.SimpleNamespace(name=name, status=status, **values)

        on_phase(event("trace", "start"))
        on_phase(event("trace", "done", seconds=1.25, detail="[212 operators]"))
        on_phase(event("weights", "start"))
        on_phase(event("weights", "progress", fraction=0.5, detail="layer 3"))
        on_phase(event("weights", "done", seconds=0.5))
        manifest = write_artifact(tmp_path / "out")
        return types.SimpleNamespace(
            path=tmp_path / "out",
            manifest=manifest,
            phases=[("trace", 1.25), ("weights", 0.5)],
            seconds=1.8,
            notes=["two experts saw no token"],
        )

    module = types.ModuleType("llmc.compiler.compile")
    module.compile_model = compile_model
    monkeypatch.setitem(sys.modules, "llmc.compiler.compile", module)
    return calls


def test_stdout_is_the_folder_and_stderr_the_phases(llmc, compiler, tmp_path: Path) -> None:
    code, out, err = llmc("compile", "model.gguf")
    assert code == 0
    assert out == f"{tmp_path / 'out'}\n"
    lines = err.splitlines()
    # A pipe gets one line for each finished phase; brackets are text, not markup.
    assert lines[0].split() == ["trace", "1.2", "s", "[212", "operators]"]
    assert lines[1].split() == ["weights", "500", "ms"]
    assert lines[2] == "note: two experts saw no token"
    assert "compiled in 1.8 s" in lines[3]


def test_options_reach_the_compiler(llmc, compiler) -> None:
    code, _, err = llmc(
        *("compile", "org/model", "--target", "cpu", "--quant", "w4a16-g32", "-o", "there"),
        *("--name", "mine", "--force", "--dump-ir", "ir", "--max-batch-tokens", "64"),
        *("--max-sequences", "4", "--context", "1024", "--kv", "f16", "--calibrate", __file__),
    )
    assert code == 0, err
    assert compiler == [
        {
            "source": "org/model",
            "target": "cpu",
            "quant": "w4a16-g32",
            "out": Path("there"),
            "name": "mine",
            "force": True,
            "dump_ir": Path("ir"),
            "max_batch_tokens": 64,
            "max_sequences": 4,
            "context_length": 1024,
            "kv": "f16",
            "calibrate": Path(__file__),
            "weights": True,
        }
    ]


def test_json_is_one_object_with_phases_and_sizes(llmc, compiler, tmp_path: Path) -> None:
    code, out, _ = llmc("compile", "model.gguf", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["path"] == str(tmp_path / "out")
    assert report["phases"][0] == {"name": "trace", "seconds": 1.25}
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert report["artifact_bytes"] == sum(sizes)
    assert report["kv_bytes_per_token"] == 8
    assert report["notes"] == ["two experts saw no token"]


def test_a_missing_package_is_answered_by_the_extra(llmc, monkeypatch) -> None:
    # None in sys.modules is Python's way to say: cannot be imported.
    module = types.ModuleType("llmc.compiler.compile")

    def compile_model(*_: object, **__: object) -> None:
        import torch  # noqa: F401

    module.compile_model = compile_model
    monkeypatch.setitem(sys.modules, "llmc.compiler.compile", module)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = llmc("compile", "model.gguf")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: compiling needs torch, which is not installed",
        'hint: pip install "llmc[compile]"',
    ]
