"""Artifacts that must not run: damaged, foreign, too new, or built for another CPU."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = ("run", "-p", "hi", "-n", "1")
COMMANDS = [RUN, ("verify",)]
Refused = Callable[..., str]


@pytest.fixture
def copied(demo_keep: Path, tmp_path: Path) -> Path:
    """A copy of the demo's artifact; large files are links until a test writes them anew."""
    folder = tmp_path / "art"
    folder.mkdir()
    for path in demo_keep.iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


@pytest.fixture
def refused(run_llmc) -> Refused:
    """Runs a command on an artifact: its one error, after checking code, hint and silence."""

    def run(command: tuple[str, ...], folder: Path, *, code: int = 6) -> str:
        found, out, err = run_llmc(command[0], folder, *command[1:])
        assert (found, out) == (code, ""), err
        assert err.startswith("error: "), err
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert len(err) < 1000
        return err.removeprefix("error: ")

    return run


def rewrite(path: Path, content: bytes) -> None:
    """Replaces a file without writing through its hard link."""
    path.unlink()
    path.write_bytes(content)


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    """Changes fields and their hash with them: no accident, but another file."""
    manifest = json.loads((folder / "llmc.json").read_text())
    del manifest["sha256"]
    edit(manifest)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    rewrite(folder / "llmc.json", (json.dumps(manifest, indent=1) + "\n").encode())


@pytest.mark.parametrize("command", COMMANDS, ids=["run", "verify"])
@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize(
    "name",
    [
        "model.so",
        "weights-00001.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "reference.json",
    ],
)
def test_a_flipped_bit_in_any_file_is_found_before_it_is_used(
    refused: Refused, copied: Path, name: str, bit: int, command: tuple[str, ...]
) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1 << bit
    rewrite(copied / name, content)
    message = refused(command, copied)
    assert name in message
    assert "\nhint: the file is damaged" in message


def test_every_file_of_the_folder_is_hashed(demo_keep: Path) -> None:
    """What the test above does not damage by name does not exist."""
    manifest = json.loads((demo_keep / "llmc.json").read_text())
    names = {path.name for path in demo_keep.iterdir()} - {"llmc.json"}
    assert set(manifest["files"]) == names
    assert names == {
        "model.so",
        "weights-00001.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "reference.json",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=["run", "verify"])
def test_a_missing_file_is_named(refused: Refused, copied: Path, command: tuple[str, ...]) -> None:
    (copied / "model.so").unlink()
    message = refused(command, copied)
    assert "model.so: missing" in message
    assert "\nhint: " in message


@pytest.mark.parametrize("command", [*COMMANDS, ("inspect",)], ids=["run", "verify", "inspect"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:1000], "llmc.json is not JSON"),
        (lambda raw: b"", "llmc.json is not JSON"),
        (lambda raw: raw[:300] + b"\xff\xfe" + raw[300:], "llmc.json: not UTF-8 at byte 300"),
        (lambda raw: b"[]", "schema_version"),
        (
            lambda raw: raw.replace(b'"schema_version": 4', b'"schema_version": 5', 1),
            "has schema 5, this llmc reads schema 4\nhint: upgrade llmc",
        ),
        (
            lambda raw: raw.replace(b'"schema_version": 4', b'"schema_version": 1', 1),
            "has schema 1, this llmc reads schema 4\nhint: compile the model again",
        ),
        (
            lambda raw: raw.replace(b'"max_abs": ', b'"max_abs": 9', 1),
            "llmc.json was changed: the SHA-256 of its fields is ",
        ),
        (lambda raw: raw.replace(b'"ranks"', b'"rank"', 1), "unknown field 'rank'"),
    ],
    ids=[
        "truncated",
        "empty",
        "not UTF-8",
        "a list",
        "newer",
        "older",
        "tolerance",
        "unknown field",
    ],
)
def test_a_damaged_or_newer_manifest_is_refused(
    refused: Refused, copied: Path, damage, expected: str, command: tuple[str, ...]
) -> None:
    rewrite(copied / "llmc.json", damage((copied / "llmc.json").read_bytes()))
    assert expected in refused(command, copied)


@pytest.mark.parametrize("command", COMMANDS, ids=["run", "verify"])
def test_a_cpu_feature_that_this_machine_lacks_is_named_before_code_is_loaded(
    refused: Refused, copied: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(copied, lambda m: m["variants"][0]["features"].append("avx9000"))
    monkeypatch.setattr(
        "llmc.runtime.executor.Executor.__init__", lambda *_, **__: pytest.fail("loaded")
    )
    message = refused(command, copied)
    assert "needs avx9000" in message
    assert "\nhint: compile the model again" in message


def test_an_artifact_for_another_device_is_refused(refused: Refused, copied: Path) -> None:
    edit_manifest(copied, lambda m: m["variants"][0].update(device_kind="abacus"))
    assert "built for abacus, not for cpu" in refused(RUN, copied)
    assert "built for abacus, not for cpu" in refused((*RUN, "--device", "cpu"), copied)


def test_a_library_that_is_none_is_refused(refused: Refused, copied: Path) -> None:
    """Rightly hashed, so that only loading it can tell."""
    rewrite(copied / "model.so", b"\x7fELF" + bytes(100))
    digest = hashlib.sha256((copied / "model.so").read_bytes()).hexdigest()
    edit_manifest(copied, lambda m: m["files"].update({"model.so": digest}))
    message = refused(RUN, copied)
    assert "model.so does not load" in message
    assert "\nhint: " in message


def test_weights_that_the_manifest_does_not_describe_are_refused(
    refused: Refused, copied: Path
) -> None:
    edit_manifest(copied, lambda m: m["weights"][0].update(shape=[1, 2, 3]))
    assert "no tensor" in refused(RUN, copied)


@pytest.mark.parametrize("part", ["weights", "caches"])
def test_a_type_that_does_not_exist_is_named(refused: Refused, copied: Path, part: str) -> None:
    edit_manifest(copied, lambda m: m[part][0].update(dtype="float31"))
    assert "'float31', expected one of float32, " in refused(RUN, copied)


def test_a_folder_that_is_no_artifact_is_refused(refused: Refused, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    assert f"{tmp_path}: no such folder\nhint: " in refused(RUN, tmp_path)
    tmp_path.mkdir()
    assert f"{tmp_path}: no llmc.json in it\nhint: " in refused(RUN, tmp_path)


# Requests


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("1,256", "token id 256 at 1, expected 0 to 255"),
        ("1,-1", "token id -1 at 1, expected 0 to 255"),
        ("1,99999999999999999999", "99999999999999999999"),
        (",".join(["1"] * 200), "200 tokens and 1 to come, at most 128 fit"),
    ],
    ids=["beyond", "negative", "huge", "too long"],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(
    refused: Refused, tiny_artifact: Path, ids: str, expected: str
) -> None:
    assert expected in refused(("run", "--ids", ids), tiny_artifact, code=9)


def test_a_text_for_an_artifact_without_tokenizer_is_refused(
    refused: Refused, tiny_artifact: Path
) -> None:
    assert "no tokenizer\nhint: " in refused(RUN, tiny_artifact, code=2)
