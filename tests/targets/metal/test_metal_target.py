"""Metal libraries are built without a Mac: what is in them, and what may be missing."""

import importlib.util
import re
from dataclasses import replace

import mach_o
import pytest
import tvm

from llmc import dialect
from llmc.errors import CompileError, UsageError
from llmc.formats import FORMATS
from llmc.targets import registry
from llmc.targets.base import Site
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.matrix_tile import multiply_tile
from llmc.targets.gpu.kernels.norm import rms_norm
from llmc.targets.metal.parameters import TILE
from llmc.targets.metal.source import THREADGROUP_BYTES, check_source, threadgroup_bytes
from llmc.targets.metal.target import PARAMETERS, MetalTarget

needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="pip install ziglang"
)
PLAIN = {"bias": False, "residual": False, "dtype": "float32", "vector_dtype": "float32"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The bytes of a linked library of one kernel a family."""
    target = MetalTarget()
    functions = {
        "gemv": linear_few(FORMATS["q4_1"], 64, 128, 1, params=PARAMETERS.gemv, **PLAIN),
        "norm": rms_norm(
            features=96,
            eps=1e-5,
            offset=0.0,
            heads=None,
            tokens=None,
            dtype="float32",
            vector_dtype="float32",
            params=PARAMETERS,
        ),
    }
    for name in ("f16", "bf16", "q4_1"):
        functions[f"tile_{name}"] = linear_many(
            FORMATS[name], 64, 128, params=TILE, multiply=multiply_tile, **PLAIN
        )
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    built = tvm.compile(tvm.IRModule(named), target=target.tvm_target)
    path = tmp_path_factory.mktemp("metal") / target.library_name
    assert target.link(built, path) == ["apple7", "arm64", "macos13"]
    return path.read_bytes()


def kernels_of(data):
    """The sources in a library, by name."""
    found = re.findall(rb"#include <metal_stdlib>.*?\n}\n", data, re.DOTALL)
    texts = [text.decode() for text in found]
    return {re.search(r"kernel void (\w+)\(", text)[1]: text for text in texts}


@needs_zig
def test_the_library_is_one_that_macos_on_apples_processors_loads(library) -> None:
    read = mach_o.read(library)
    assert (read.processor, read.kind) == (mach_o.ARM64, mach_o.DYLIB)
    assert (read.platform, read.oldest) == (1, (13, 0))
    # The system ends a process that loads code without a signature.
    assert read.signed
    assert read.name == "@rpath/model.dylib"
    assert read.needs == ["/usr/lib/libSystem.B.dylib"]


@needs_zig
def test_the_library_needs_tvms_c_interface_and_the_system_alone(library) -> None:
    read = mach_o.read(library)
    assert {"___tvm_ffi_gemv", "___tvm_ffi_norm", "___tvm_ffi_tile_q4_1"} <= read.defined
    assert "___TVMFFIEnvModLookupFromImports" in read.bound  # filled by the runtime: the kernels
    others = {s for s in read.bound - read.defined if not s.startswith(("_TVMFFI", "_TVMBackend"))}
    assert others <= {"dyld_stub_binder", "_memset", "_memcpy", "_bzero"}


@needs_zig
def test_kernels_are_sources_of_metals_language(library) -> None:
    sources = kernels_of(library)
    assert set(sources) == {
        f"{n}_kernel" for n in ("gemv", "norm", "tile_f16", "tile_bf16", "tile_q4_1")
    }
    for name, text in sources.items():
        assert check_source(text) == text
        assert threadgroup_bytes(text) <= THREADGROUP_BYTES, name
        # No function but Metal's own and the kernel.
        called = set(re.findall(r"\b([a-z_]\w*)\(", text)) - {"if", "for", name, "buffer"}
        assert called <= {
            *("max", "min", "sqrt", "threadgroup_barrier", "simd_sum"),
            *("simdgroup_load", "simdgroup_store", "simdgroup_multiply_accumulate"),
        }, name
    assert "int4*)(weight_codes" in sources["gemv_kernel"]  # 16 bytes at a time
    assert "simd_sum(" in sources["norm_kernel"]


@needs_zig
@pytest.mark.parametrize(("name", "kind"), [("f16", "half"), ("q4_1", "half"), ("bf16", "float")])
def test_products_of_many_tokens_are_simdgroup_matrices_summed_in_float(
    library, name, kind
) -> None:
    text = kernels_of(library)[f"tile_{name}_kernel"]
    matrices = dict(re.findall(r"simdgroup_(half|float)8x8 (\w+)\[\d+\];", text)[::-1])
    assert kind in matrices
    sums = re.findall(r"simdgroup_multiply_accumulate\((\w+)\[\d+\], (\w+)\[\d+\], (\w+)\[", text)
    declared = {v: k for k, v in re.findall(r"simdgroup_(half|float)8x8 (\w+)\[", text)}
    assert {(declared[d], declared[a], declared[b]) for d, a, b in sums} == {("float", kind, kind)}


HEAD = "kernel void norm_kernel(  device float* x [[ buffer(0) ]]) {\n"


@pytest.mark.parametrize("kind", ["double", "bfloat", "bfloat4", "half8"])
def test_a_type_that_metal_lacks_is_named_with_its_kernel(kind) -> None:
    with pytest.raises(CompileError, match=f"norm_kernel uses {kind}, which Metal 2.3"):
        check_source(f"{HEAD}  thread {kind} v[2];\n}}\n")


def test_threadgroup_memory_is_added_up_and_limited() -> None:
    text = f"{HEAD}  threadgroup half v[5];\n  threadgroup float4 v_1[2];\n}}\n"
    assert threadgroup_bytes(text) == 16 + 32
    assert check_source(text) == text
    with pytest.raises(CompileError, match="norm_kernel needs 32784 bytes"):
        check_source(f"{text}  threadgroup int w[8180];\n  threadgroup char u[1];\n")


@needs_zig
@pytest.mark.parametrize(
    ("name", "max_tokens", "rule"),
    [
        ("bf16", 4096, "metal.simdgroup"),
        ("q4_0", 4096, "metal.simdgroup"),
        ("f32", 4096, "metal.simdgroup"),
        ("q4_0", 8, "gpu.few"),
    ],
)
def test_products_of_many_tokens_go_to_simdgroup_matrices(name, max_tokens, rule) -> None:
    tokens = tvm.tirx.Var("T", "int64")
    shapes = {"x": [1, tokens, 64], "weight": [96, 64]}
    assert chosen(dialect.Linear(format=name), max_tokens, shapes) == rule


@needs_zig
@pytest.mark.parametrize(
    ("max_tokens", "rule"), [(4096, "metal.simdgroup_experts"), (8, "gpu.few_experts")]
)
def test_so_do_experts(max_tokens, rule) -> None:
    tokens = tvm.tirx.Var("T", "int64")
    shapes = {"x": [tokens, 64], "expert_ids": [tokens, 2], "weight": [4, 96, 64]}
    assert chosen(dialect.GroupedLinear(format="q4_0"), max_tokens, shapes) == rule


def chosen(op, max_tokens, shapes):
    types = {
        name: tvm.relax.TensorType(shape, "int32" if name == "expert_ids" else "float32")
        for name, shape in shapes.items()
    }
    site = Site(op=op, types=types, max_tokens=max_tokens, tokens=None, num_groups=1, page_size=16)
    return next(name for name, rule in MetalTarget().kernel_rules if rule(site) is not None)


@pytest.mark.parametrize("level", ["foo", "apple7", "macos14", ""])
def test_there_are_no_levels(level) -> None:
    with pytest.raises(UsageError, match="unknown Metal level") as caught:
        MetalTarget(level)
    assert "--target metal" in (caught.value.hint or "")


def test_a_missing_linker_is_named_with_the_command_that_brings_it(monkeypatch) -> None:
    monkeypatch.setattr("llmc.targets.cpu.link.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("llmc.targets.cpu.link.Platform.is_host", False)
    with pytest.raises(CompileError, match="links for aarch64 Darwin") as caught:
        MetalTarget()
    assert caught.value.hint == "pip install ziglang"


def test_a_machine_that_is_no_mac_builds_and_says_where_it_runs(monkeypatch) -> None:
    monkeypatch.setattr("llmc.targets.cpu.link.Platform.is_host", False)
    (metal,) = [status for status in registry.list_targets() if status.name == "metal"]
    assert not metal.can_run
    assert any("Metal runs on macOS with Apple's processors" in r for r in metal.reasons)


@pytest.mark.parametrize(
    "wrong", [{"rows": 48}, {"group_rows": 24}, {"group_tokens": 12}, {"depth": 12}]
)
def test_a_tile_that_does_not_divide_is_no_tile(wrong) -> None:
    right = {"rows": 64, "tokens": 32, "group_rows": 32, "group_tokens": 16, "depth": 32}
    assert replace(TILE, **right).threads == 128
    with pytest.raises(AssertionError):
        replace(TILE, **{**right, **wrong})
