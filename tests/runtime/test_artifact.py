"""The manifest's own hash: no byte of llmc.json can change unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from fake_model import make_manifest
from hypothesis import given
from hypothesis import strategies as st

from llmc.artifact import MANIFEST_FILE, Manifest, VerifyTolerance
from llmc.errors import ArtifactError

MANIFEST = dataclasses.replace(
    make_manifest(),
    # Numbers and texts that JSON can write in several ways.
    verify=VerifyTolerance(max_mean_abs=1e-05, max_abs=0.5),
    files={"modèle.so": "ab" * 32},
)
WRITTEN = MANIFEST.to_json().encode()


def load(raw: bytes, folder) -> Manifest:
    (folder / MANIFEST_FILE).write_bytes(raw)
    return Manifest.load(folder)


def test_a_manifest_is_read_back_as_it_was_written(tmp_path):
    assert load(WRITTEN, tmp_path) == MANIFEST


def test_the_hash_is_the_documented_one():
    fields = json.loads(WRITTEN)
    stated = fields.pop("sha256")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert stated == hashlib.sha256(canonical.encode()).hexdigest()


@given(position=st.integers(0, len(WRITTEN) - 1), mask=st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory, position, mask):
    changed = bytearray(WRITTEN)
    changed[position] ^= mask
    with pytest.raises(ArtifactError):
        load(bytes(changed), tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x20])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, mask):
    """Every byte, with the bits that turn a digit into another and a letter into a capital."""
    for position in range(len(WRITTEN)):
        changed = bytearray(WRITTEN)
        changed[position] ^= mask
        try:
            load(bytes(changed), tmp_path)
        except ArtifactError:
            continue
        pytest.fail(f"byte {position} of {WRITTEN[position - 20 : position + 20]!r}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b"\r"),
        (b"\n", b"\r\n"),
        (b'": ', b'":\t'),
        (b"1e-05", b"1E-05"),
        (b"1e-05", b"0.00001"),
        (b"\\u00e8", b"\\u00E8"),
        (b"\\u00e8", "è".encode()),
        (b'"ranks": 1,', b'"ranks": 7, "ranks": 1,'),
        (b"\n}\n", b"\n}\n\n"),
    ],
)
def test_even_what_changes_no_value_is_noticed(tmp_path, old, new):
    assert old in WRITTEN
    with pytest.raises(ArtifactError, match="written differently\nhint: the file is damaged"):
        load(WRITTEN.replace(old, new, 1), tmp_path)


def test_a_changed_value_is_told_from_a_changed_hash_by_neither(tmp_path):
    """Which of the two was damaged cannot be known: the message shows both."""
    stated = json.loads(WRITTEN)["sha256"]
    other = "0" * 64
    with pytest.raises(ArtifactError, match=f"its fields is {stated[:16]}…, it says {other[:16]}…"):
        load(WRITTEN.replace(stated.encode(), other.encode()), tmp_path)


def test_a_manifest_without_a_hash_is_refused(tmp_path):
    fields = json.loads(WRITTEN)
    del fields["sha256"]
    with pytest.raises(ArtifactError, match="missing field 'sha256'"):
        load(json.dumps(fields, indent=1).encode(), tmp_path)
