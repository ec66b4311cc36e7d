from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmc.compiler.quantizer import quantize
from llmc.compiler.weight_plan import WeightSpec
from llmc.compiler.weights import (
    ALIGNMENT,
    Argument,
    dequantized,
    describe,
    stored_formats,
    stored_matrices,
    write_weights,
)
from llmc.errors import ImportModelError
from llmc.formats import FORMATS, QuantizedMatrix
from llmc.models.source import SourceTensor
from llmc.runtime.weights import _mapped, large_page_bytes
from llmc.targets.registry import open_target

FILE = "weights-00001.safetensors"
RNG = np.random.default_rng(0)


def source(name, values, stored="f32", codes=None):
    return SourceTensor(
        name=name,
        shape=values.shape,
        stored=stored,
        load=lambda: values,
        load_quantized=lambda: codes,
    )


def q4_1(rows, k=64):
    """Codes with scales and minimums of their own, and their values."""
    codes = QuantizedMatrix(
        format=FORMATS["q4_1"],
        codes=RNG.integers(0, 16, (rows, k), dtype=np.uint8),
        scales=RNG.random((rows, k // 32)).astype(np.float16),
        mins=-RNG.random((rows, k // 32)).astype(np.float16),
    )
    return codes, codes.dequantize()


def dense(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def tensors(**values):
    return {n: v if isinstance(v, SourceTensor) else source(n, v) for n, v in values.items()}


def packed(sources, fmt, part=0, transposed=False):
    return WeightSpec(
        sources=sources, format=fmt, transposed=transposed, layout="panel16", part=part
    )


def all_rows(spec, given):
    """The whole of every matrix."""
    return [m.rows(slice(0, m.shape[0])) for m in stored_matrices(spec, given)]


def test_sources_are_joined_row_by_row():
    q, k = dense(4, 8), dense(2, 8)
    spec = WeightSpec(sources=["q", "k"], format="f32")
    [matrix] = stored_matrices(spec, tensors(q=q, k=k))
    whole = np.concatenate([q, k])
    assert matrix.shape == whole.shape
    for start, stop in [(0, 6), (0, 2), (1, 4), (3, 5), (4, 6), (5, 6)]:
        np.testing.assert_array_equal(matrix.rows(slice(start, stop)), whole[start:stop])


def test_sources_of_several_types_are_joined_in_float32():
    q, k = dense(4, 8).astype(ml_dtypes.bfloat16), dense(2, 8).astype(np.float16)
    [matrix] = all_rows(WeightSpec(sources=["q", "k"], format="f32"), tensors(q=q, k=k))
    np.testing.assert_array_equal(
        matrix, np.concatenate([q.astype(np.float32), k.astype(np.float32)])
    )


def test_transposed_sources_are_turned_before_they_are_joined():
    q, k = dense(8, 4), dense(8, 2)
    spec = WeightSpec(sources=["q", "k"], format="f32", transposed=True)
    [matrix] = all_rows(spec, tensors(q=q, k=k))
    np.testing.assert_array_equal(matrix, np.concatenate([q.T, k.T]))


def test_experts_stay_apart_and_are_turned_one_by_one():
    up = dense(3, 8, 4)
    spec = WeightSpec(sources=["up"], format="f32", transposed=True)
    matrices = all_rows(spec, tensors(up=up))
    np.testing.assert_array_equal(np.stack(matrices), up.transpose(0, 2, 1))


def test_stored_codes_are_kept_bit_by_bit():
    """The file's own numbers reach the kernels: nothing is quantized twice."""
    (a, va), (b, vb) = q4_1(3), q4_1(2)
    given = tensors(a=source("a", va, "q4_1", a), b=source("b", vb, "q4_1", b))
    [matrix] = stored_matrices(packed(["a", "b"], "q4_1"), given)
    for rows in (slice(0, 5), slice(1, 2), slice(2, 4)):
        found = matrix.rows(rows)
        for name in ("codes", "scales", "mins"):
            both = np.concatenate([getattr(a, name), getattr(b, name)])
            np.testing.assert_array_equal(getattr(found, name), both[rows])


def test_all_sources_are_rounded_where_one_has_no_codes(tmp_path):
    (a, va), vb = q4_1(3), dense(2, 64)
    given = tensors(a=source("a", va, "q4_1", a), b=source("b", vb, "q4_1", None))
    [matrix] = all_rows(packed(["a", "b"], "q4_1"), given)
    np.testing.assert_array_equal(matrix, np.concatenate([va, vb]))


@pytest.mark.parametrize("fmt", ["w4-g32", "w4-g64-asym", "w8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_written_is_what_the_reference_sees_without_another_search(
    tmp_path, monkeypatch, fmt, transposed
):
    monkeypatch.setattr("llmc.compiler.quantizer._BLOCK_WEIGHTS", 24 * 64)
    target = open_target("cpu")
    values = {"q": dense(70, 64), "k": dense(33, 64), "x": dense(3, 50, 64)}
    shown = {n: v.swapaxes(-1, -2).copy() if transposed else v for n, v in values.items()}
    joined, experts = packed(["q", "k"], fmt, transposed=transposed), packed(["x"], fmt)
    experts = replace(experts, transposed=transposed)
    wanted = [
        *arguments_of(target, "qk", joined, (103, 64)),
        *arguments_of(target, "x", experts, (3, 50, 64)),
    ]
    given = tensors(**shown)
    grids = write_weights(tmp_path, wanted, given, target, lambda f: None)
    monkeypatch.setattr("llmc.compiler.weights.fit_grid", None)
    for name, spec in (("q", joined), ("k", joined), ("x", experts)):
        found = dequantized(name, spec, given, grids).whole()
        matrices = values[name] if name == "x" else values[name][None]
        exact = np.stack([quantize(m, FORMATS[fmt]).dequantize() for m in matrices])
        exact = exact if name == "x" else exact[0]
        exact = exact.swapaxes(-1, -2) if transposed else exact
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)


def test_the_stored_codes_of_experts_are_split_by_expert():
    codes, values = q4_1(6)
    given = tensors(up=source("up", values.reshape(3, 2, 64), "q4_1", codes))
    matrices = all_rows(packed(["up"], "q4_1"), given)
    assert len(matrices) == 3
    np.testing.assert_array_equal(matrices[1].codes, codes.codes[2:4])


def test_codes_of_another_format_are_quantized_from_their_values(tmp_path):
    codes, values = q4_1(4)
    target = open_target("cpu")
    wanted = arguments_of(target, "a", packed(["a"], "w8"), values.shape)
    given = tensors(a=source("a", values, "q4_1", codes))
    write_weights(tmp_path, wanted, given, target, lambda f: None)
    expected = target.pack(FORMATS["w8"], quantize(values, FORMATS["w8"]))
    np.testing.assert_array_equal(load_file(tmp_path / FILE)["a.codes"], expected[0])


@pytest.mark.parametrize("target", ["cpu", "vulkan"])
@pytest.mark.parametrize("fmt", ["w4-g64-asym", "f16"])
def test_weights_that_are_written_some_panels_at_a_time_are_those_packed_as_a_whole(
    tmp_path, monkeypatch, target, fmt
):
    """Blocks of one panel, the last of them not full, over the borders of sources and experts."""
    monkeypatch.setattr("llmc.compiler.quantizer._BLOCK_WEIGHTS", 40 * 64)
    device = open_target(target)
    q, k, experts = dense(150, 64), dense(75, 64), dense(3, 200, 64)
    wanted = [
        *arguments_of(device, "qk", packed(["q", "k"], fmt), (225, 64)),
        *arguments_of(device, "x", packed(["x"], fmt), experts.shape),
    ]
    write_weights(tmp_path, wanted, tensors(q=q, k=k, x=experts), device, lambda f: None)
    stored = load_file(tmp_path / FILE)

    def whole(values):
        form = FORMATS[fmt]
        return device.pack(form, values if form.is_float else quantize(values, form))

    for part, argument in enumerate(wanted[: len(wanted) // 2]):
        suffix = argument.name.removeprefix("qk.")
        np.testing.assert_array_equal(
            stored[argument.name], whole(np.concatenate([q, k]))[part], strict=True
        )
        each = np.stack([whole(expert)[part] for expert in experts])
        np.testing.assert_array_equal(stored[f"x.{suffix}"], each, strict=True)


def test_blocks_that_cannot_be_kept_are_known_from_one_layer():
    codes, values = q4_1(4)
    asked = []

    def block_source(name, kept):
        def load_quantized():
            asked.append(name)
            return kept

        return replace(source(name, values, "q4_1"), load_quantized=load_quantized)

    given = tensors(
        **{f"h.{i}.up.weight": block_source(f"h.{i}.up.weight", codes) for i in range(3)},
        **{f"h.{i}.qkv.weight": block_source(f"h.{i}.qkv.weight", None) for i in range(3)},
        embed=source("embed", values, "f16"),
        merged=source("merged", values, "q4_1+q8_0"),
    )
    assert stored_formats(given) == {
        **{f"h.{i}.up.weight": "q4_1" for i in range(3)},
        **{f"h.{i}.qkv.weight": "f32" for i in range(3)},
        "embed": "f16",
        "merged": "q4_1+q8_0",
    }
    assert asked == ["h.0.up.weight", "h.0.qkv.weight"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("fmt", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("w8", 1 / 127)])
def test_what_the_kernels_see_is_in_the_models_shape_and_within_a_rounding(fmt, step, transposed):
    """Half a step of the largest value of a row bounds the error of every format."""
    values = dense(6, 64)
    shown = values.T.copy() if transposed else values
    spec = packed(["a"], fmt, transposed=transposed)
    rows = dequantized("a", spec, tensors(a=shown))
    found = rows.whole()
    assert found.shape == rows.shape == shown.shape
    np.testing.assert_array_equal(rows.read(0, slice(2, 5)), found[2:5])
    assert np.abs(found - shown).max() <= step * np.abs(values).max()
    assert np.abs(found - shown).max() > 0


def test_plain_arguments_are_seen_as_stored():
    values = dense(8).astype(np.float16)
    found = dequantized("n", WeightSpec(sources=["n"]), tensors(n=values))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))


def arguments_of(target, name, spec, shape):
    parts = target.packed_parts(FORMATS[spec.format], shape)
    return [
        Argument(
            name=f"{name}.{p.suffix}", spec=replace(spec, part=i), shape=p.shape, dtype=p.dtype
        )
        for i, p in enumerate(parts)
    ]


def test_the_file_holds_every_array_aligned_and_described(tmp_path):
    target = open_target("cpu")
    a, norm, bias = dense(20, 64), dense(64), dense(5)
    wanted = [
        *arguments_of(target, "a", packed(["a"], "w4-g32"), a.shape),
        Argument(name="bias", spec=WeightSpec(sources=["bias"]), shape=(5,), dtype="float32"),
        Argument(name="norm", spec=WeightSpec(sources=["norm"]), shape=(64,), dtype="float32"),
    ]
    path = tmp_path / FILE
    seen = []
    given = tensors(a=a, norm=norm, bias=bias)
    write_weights(tmp_path, wanted, given, target, seen.append)
    entries = describe(wanted)
    stored = load_file(path)
    np.testing.assert_array_equal(stored["norm"], norm)
    np.testing.assert_array_equal(stored["bias"], bias)
    expected = target.pack(FORMATS["w4-g32"], quantize(a, FORMATS["w4-g32"]))
    np.testing.assert_array_equal(stored["a.codes"], expected[0])
    np.testing.assert_array_equal(stored["a.scales"], expected[1])
    assert [e.name for e in entries] == [w.name for w in wanted]
    assert entries[0].layout == "panel16"
    assert entries[0].sources == ["a"]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    begins = {name: begin for name, (begin, _) in offsets(path).items()}
    assert all(begins[n] % ALIGNMENT == 0 for n in ("a.codes", "a.scales", "norm"))


def test_arrays_are_shared_out_to_files_in_their_order(tmp_path, monkeypatch):
    """A file for each 100 bytes in which an array begins."""
    monkeypatch.setattr("llmc.compiler.weights.FILE_BYTES", 100)
    given = {n: dense(size) for n, size in (("a", 10), ("b", 15), ("c", 30), ("d", 1), ("e", 20))}
    wanted = [
        Argument(name=n, spec=WeightSpec(sources=[n]), shape=v.shape, dtype="float32")
        for n, v in given.items()
    ]
    write_weights(tmp_path, wanted, tensors(**given), open_target("cpu"), lambda f: None)
    files = {e.name: e.file for e in describe(wanted)}
    names = [f"weights-{i:05}.safetensors" for i in range(1, 4)]
    assert list(files.values()) == [names[0], names[0], names[1], names[2], names[2]]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name, values in given.items():
        np.testing.assert_array_equal(load_file(tmp_path / files[name])[name], values)


def test_files_are_kept_in_large_pages_where_the_system_has_them(tmp_path):
    size, part = 16 * 2**20, bytes(2**21)
    with (tmp_path / "in_order").open("wb", buffering=0) as file:
        for _ in range(0, size, len(part)):
            file.write(part)
    # Whether there are such pages for files is up to the kernel (ext4: since 6.16) and the file
    # system; without them the zeros that files begin with are of no use, and of no harm.
    if _share_in_large_pages(tmp_path / "in_order") < 1:
        pytest.skip("this system keeps written files in small pages")
    rng = np.random.default_rng(5)
    given = {n: rng.standard_normal(size // 32, np.float32) for n in "abcdefgh"}
    wanted = [
        Argument(name=n, spec=WeightSpec(sources=[n]), shape=v.shape, dtype="float32")
        for n, v in given.items()
    ]
    write_weights(tmp_path, wanted, tensors(**given), open_target("cpu"), lambda f: None)
    assert _share_in_large_pages(tmp_path / FILE) > 0.9


def _share_in_large_pages(path):
    data = _mapped(path)
    return large_page_bytes(data.ctypes.data) / (data.nbytes // 2**21 * 2**21)


def test_a_large_model_has_no_more_than_64_files(monkeypatch):
    monkeypatch.setattr("llmc.compiler.weights.FILE_BYTES", 1)
    spec = WeightSpec(sources=["a"])
    wanted = [Argument(name=f"{i}", spec=spec, shape=(5,), dtype="float32") for i in range(6400)]
    assert len({e.file for e in describe(wanted)}) == 64
    # Arrays that are more than half a 64th of all.
    assert len({e.file for e in describe(wanted[:100])}) <= 64


def offsets(path):
    """name -> (first byte in the file, last byte + 1)."""
    import json

    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {n: tuple(8 + length + o for o in e["data_offsets"]) for n, e in header.items()}


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path):
    wanted = [
        Argument(name="n", spec=WeightSpec(sources=["model.norm"]), shape=(4,), dtype="float32")
    ]
    with pytest.raises(ImportModelError, match=r"no tensor model\.norm"):
        write_weights(tmp_path, wanted, {}, open_target("cpu"), lambda f: None)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    wanted = [Argument(name="n", spec=WeightSpec(sources=["n"]), shape=(4,), dtype="float32")]
    with pytest.raises(ImportModelError, match=r"shape \(5,\), expected \(4,\)"):
        write_weights(tmp_path, wanted, tensors(n=dense(5)), open_target("cpu"), lambda f: None)
