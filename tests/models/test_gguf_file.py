"""Damaged GGUF headers must be refused by a message before anything is allocated."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_gguf

from llmc.errors import ImportModelError
from llmc.models.gguf_file import GgufFile


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str = "w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    table = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return text(name) + table


def write(
    path: Path,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pairs: list[bytes] = (),
    entries: list[bytes] = (),
    num_pairs: int | None = None,
    num_tensors: int | None = None,
    data: bytes = b"\0" * 16,
) -> Path:
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(entries) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    header += b"".join(pairs) + b"".join(entries)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def test_metadata_and_tensors_equal_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.ones(5, np.float32)}
    metadata = {
        "count": 7, "ratio": 0.5, "flag": True, "title": "Größe", "sizes": [1, 2, 3],
        "tokenizer.ggml.tokens": ["a", "", "ü"], "general.alignment": 64,
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", "tiny", metadata, tensors)

    file = GgufFile.open(path)

    assert file.architecture == "tiny"
    assert {key.removeprefix("tiny."): file.metadata[key] for key in file.metadata} == {
        "general.architecture": "tiny",
        **metadata,
    }
    for name, values in tensors.items():
        assert file.tensors[name].shape == values.shape
        assert file.tensors[name].offset % 64 == 0
        np.testing.assert_array_equal(file.blocks(name).view(np.float32), values)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", "tiny", {"names": ["a", "b"], "n": 3}, {"w": np.ones(8, np.float32)}
    )
    raw = path.read_bytes()
    assert len(raw) < 1000
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ImportModelError, match=r"m\.gguf"):
            GgufFile.open(path)


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", "tiny", {"names": ["a", "b"], "n": 3}, {"w": np.ones(8, np.float32)}
    )
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = raw.copy()
        damaged[rng.integers(0, len(raw), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            GgufFile.open(path)
        except ImportModelError:
            refused += 1
    assert refused > 100


HUGE = 2**63
BAD = {
    "wrong magic": ({"magic": b"GGML"}, "GGML"),
    "old version": ({"version": 1}, "version 1"),
    "big-endian version": ({"version": 3 << 24}, "version"),
    "absurd tensor count": ({"num_tensors": HUGE}, f"tensor count {HUGE}"),
    "absurd metadata count": ({"num_pairs": HUGE}, f"metadata count {HUGE}"),
    "absurd key length": ({"pairs": [struct.pack("<Q", HUGE)], "num_pairs": 1}, "metadata key"),
    "absurd string length": (
        {"pairs": [pair("k", 8, struct.pack("<Q", HUGE))], "num_pairs": 1},
        "'k'",
    ),
    "absurd array length": ({"pairs": [pair("k", 9, struct.pack("<IQ", 5, HUGE))]}, str(HUGE)),
    "absurd string array length": (
        {"pairs": [pair("k", 9, struct.pack("<IQ", 8, HUGE))]},
        str(HUGE),
    ),
    "nested array": ({"pairs": [pair("k", 9, struct.pack("<IQ", 9, 0))]}, "unknown value type 9"),
    "unknown value type": ({"pairs": [pair("k", 77, b"\0" * 8)]}, "77"),
    "duplicate key": ({"pairs": [pair("k", 0, b"\0")] * 2}, "'k' appears twice"),
    "key that is not UTF-8": ({"pairs": [struct.pack("<Q", 2) + b"\xff\xfe"]}, "UTF-8"),
    "bad alignment": (
        {"pairs": [pair("general.alignment", 4, struct.pack("<I", 3))]},
        "alignment",
    ),
    "zero alignment": (
        {"pairs": [pair("general.alignment", 4, struct.pack("<I", 0))]},
        "alignment",
    ),
    "duplicate tensor": ({"entries": [entry(), entry()]}, "'w' appears twice"),
    "no dimensions": ({"entries": [entry(dims=())]}, "0 dimensions"),
    "too many dimensions": ({"entries": [entry(dims=(1,) * 5)]}, "5 dimensions"),
    "empty tensor": ({"entries": [entry(dims=(0,))]}, "shape"),
    "overflowing shape": ({"entries": [entry(dims=(2**32, 2**32))]}, "beyond the end"),
    "tensor beyond the end": ({"entries": [entry(dims=(5,))]}, "beyond the end"),
    "offset beyond the end": ({"entries": [entry(offset=2**62)]}, "beyond the end"),
    "offset not aligned": ({"entries": [entry(offset=4)], "data": b"\0" * 64}, "offset 4"),
    "unknown tensor type": ({"entries": [entry(kind=99)]}, "unknown type 99"),
    "part of a block": ({"entries": [entry(dims=(33,), kind=8)]}, "multiple of 32"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_header_is_named(case: str, tmp_path: Path) -> None:
    parts, message = BAD[case]
    path = write(tmp_path / "bad.gguf", **parts)
    with pytest.raises(ImportModelError, match=message) as caught:
        GgufFile.open(path)
    assert str(path) in caught.value.message
    assert caught.value.hint is not None


def test_a_value_of_another_type_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "tiny", {"n": 3, "s": "x"}, {})
    file = GgufFile.open(path)
    with pytest.raises(ImportModelError, match=r"tiny\.n.*expected a string"):
        file.optional_string("tiny.n")
    with pytest.raises(ImportModelError, match=r"tiny\.s.*expected an integer"):
        file.optional_int("tiny.s")
    with pytest.raises(ImportModelError, match=r"tiny\.n.*array of strings"):
        file.strings("tiny.n")
    with pytest.raises(ImportModelError, match=r"tiny\.absent.*missing"):
        file.string("tiny.absent")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"absent\.gguf: no such file"):
        GgufFile.open(tmp_path / "absent.gguf")
