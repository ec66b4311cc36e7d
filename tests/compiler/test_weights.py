from dataclasses import replace

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
    matrices_of,
    stored_formats,
    write_weights,
)
from llmc.errors import ImportModelError
from llmc.formats import FORMATS, QuantizedMatrix
from llmc.models.source import SourceTensor
from llmc.targets.registry import open_target

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


def test_sources_are_joined_row_by_row():
    q, k = dense(4, 8), dense(2, 8)
    spec = WeightSpec(sources=["q", "k"], format="f32")
    [matrix], stacked = matrices_of(spec, tensors(q=q, k=k))
    np.testing.assert_array_equal(matrix, np.concatenate([q, k]))
    assert not stacked


def test_transposed_sources_are_turned_before_they_are_joined():
    q, k = dense(8, 4), dense(8, 2)
    spec = WeightSpec(sources=["q", "k"], format="f32", transposed=True)
    [matrix], _ = matrices_of(spec, tensors(q=q, k=k))
    np.testing.assert_array_equal(matrix, np.concatenate([q.T, k.T]))


def test_experts_stay_apart_and_are_turned_one_by_one():
    up = dense(3, 8, 4)
    spec = WeightSpec(sources=["up"], format="f32", transposed=True)
    matrices, stacked = matrices_of(spec, tensors(up=up))
    assert stacked
    np.testing.assert_array_equal(np.stack(matrices), up.transpose(0, 2, 1))


def test_stored_codes_are_kept_bit_by_bit():
    """The file's own numbers reach the kernels: nothing is quantized twice."""
    (a, va), (b, vb) = q4_1(3), q4_1(2)
    given = tensors(a=source("a", va, "q4_1", a), b=source("b", vb, "q4_1", b))
    [matrix], _ = matrices_of(packed(["a", "b"], "q4_1"), given)
    np.testing.assert_array_equal(matrix.codes, np.concatenate([a.codes, b.codes]))
    np.testing.assert_array_equal(matrix.scales, np.concatenate([a.scales, b.scales]))
    np.testing.assert_array_equal(matrix.mins, np.concatenate([a.mins, b.mins]))


def test_the_stored_codes_of_experts_are_split_by_expert():
    codes, values = q4_1(6)
    given = tensors(up=source("up", values.reshape(3, 2, 64), "q4_1", codes))
    matrices, stacked = matrices_of(packed(["up"], "q4_1"), given)
    assert stacked
    assert len(matrices) == 3
    np.testing.assert_array_equal(matrices[1].codes, codes.codes[2:4])


def test_codes_of_another_format_are_quantized_from_their_values():
    codes, values = q4_1(4)
    given = tensors(a=source("a", values, "q4_1", codes))
    [matrix], _ = matrices_of(packed(["a"], "w8"), given)
    np.testing.assert_array_equal(matrix.codes, quantize(values, FORMATS["w8"]).codes)


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
    found = dequantized("a", spec, tensors(a=shown))
    assert found.shape == shown.shape
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
    path = tmp_path / "weights.safetensors"
    seen = []
    given = tensors(a=a, norm=norm, bias=bias)
    write_weights(path, wanted, given, target, seen.append)
    entries = describe(wanted)
    stored = load_file(path)
    np.testing.assert_array_equal(stored["norm"], norm)
    np.testing.assert_array_equal(stored["bias"], bias)
    expected = target.pack(FORMATS["w4-g32"], [quantize(a, FORMATS["w4-g32"])], stacked=False)
    np.testing.assert_array_equal(stored["a.codes"], expected[0])
    np.testing.assert_array_equal(stored["a.scales"], expected[1])
    assert [e.name for e in entries] == [w.name for w in wanted]
    assert entries[0].layout == "panel16"
    assert entries[0].sources == ["a"]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    begins = {name: begin for name, (begin, _) in offsets(path).items()}
    assert all(begins[n] % ALIGNMENT == 0 for n in ("a.codes", "a.scales", "norm"))


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
        write_weights(tmp_path / "w", wanted, {}, open_target("cpu"), lambda f: None)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    wanted = [Argument(name="n", spec=WeightSpec(sources=["n"]), shape=(4,), dtype="float32")]
    with pytest.raises(ImportModelError, match=r"shape \(5,\), expected \(4,\)"):
        write_weights(
            tmp_path / "w", wanted, tensors(n=dense(5)), open_target("cpu"), lambda f: None
        )
