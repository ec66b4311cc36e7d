"""What is in a ROCm library, made without ROCm and without a GPU."""

import re
import struct
from dataclasses import replace

import pytest
import tvm

from llmc import dialect
from llmc.errors import CompileError, UsageError
from llmc.formats import FORMATS
from llmc.targets import registry
from llmc.targets.base import Site
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.grouped_tiles import grouped_tiles
from llmc.targets.gpu.kernels.linear import linear_few
from llmc.targets.gpu.kernels.norm import add_rms_norm
from llmc.targets.rocm import code_objects, linker
from llmc.targets.rocm.kernels.linear import ExpertTile, linear_matrix
from llmc.targets.rocm.parameters import FAMILIES, PARAMETERS
from llmc.targets.rocm.target import RocmTarget

ARCHITECTURES = [(family, name) for family in FAMILIES for name in family.architectures]
INSTRUCTIONS = {
    "gfx90a": {"bf16": "v_mfma_f32_16x16x16bf16_1k", "q4": "v_mfma_f32_16x16x16f16"},
    "gfx942": {"bf16": "v_mfma_f32_16x16x16_bf16", "q4": "v_mfma_f32_16x16x16_f16"},
    "gfx1100": {"bf16": "v_wmma_f32_16x16x16_bf16", "q4": "v_wmma_f32_16x16x16_f16"},
}
# Machines of AMD's, as ELF headers name them.
MACHINES = {"gfx90a": 0x3F, "gfx942": 0x4C, "gfx1100": 0x41}
PLAIN = {"bias": False, "residual": True, "dtype": "float16", "vector_dtype": "float16"}
LOADS = r"global_load_(dwordx4|b128)"


def functions(family):
    """A kernel of each kind, in the sizes of a model of 8 billion parameters."""
    params = replace(PARAMETERS, features=family.features)
    q4, bf16 = FORMATS["w4-g128"], FORMATS["bf16"]
    experts = {"per_token_input": True, "bias": True, "dtype": "float16", "vector_dtype": "float16"}
    return {
        "gemv": linear_few(q4, 4096, 4096, 1, params=params.gemv, **PLAIN),
        "few": linear_few(bf16, 4096, 4096, None, params=params.few, **PLAIN),
        "matrix_bf16": linear_matrix(bf16, 4096, 4096, plan=family.matrix, **PLAIN),
        "matrix_q4": linear_matrix(q4, 4096, 4096, plan=family.matrix, **PLAIN),
        "experts_q4": grouped_tiles(
            *(q4, 8, 1024, 2048, 2),
            tile=ExpertTile(family.matrix.experts, family.matrix.instruction),
            **experts,
        ),
        "few_experts": grouped_linear(
            q4, 8, 1024, 2048, 2, tokens=None, params=params.gemv, **experts
        ),
        "norm": add_rms_norm(
            features=16384,
            eps=1e-5,
            offset=0.0,
            tokens=None,
            dtype="float16",
            vector_dtype="float16",
            params=params,
        ),
        "attention": paged_attention(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            v_head_dim=128,
            page_size=16,
            kv_dtype="float16",
            scale=0.1,
            window=None,
            softcap=None,
            sinks=False,
            group=0,
            num_groups=1,
            tokens=None,
            dtype="float16",
            sink_dtype="float32",
            params=params,
        ),
    }


@pytest.fixture(scope="module")
def target(rocm):
    """Both architectures of one family, as one artifact has them, and the other family's."""
    return {family.features.subgroup: compiled(family) for family in FAMILIES}


def compiled(family):
    """(kernels, code objects) of `functions`."""
    kept = []
    target = RocmTarget(",".join(family.architectures))
    compile_kernels = code_objects.compile_kernels

    def keep(*arguments):
        kept.append(compile_kernels(*arguments))
        return kept[-1]

    named = {name: f.with_attr("global_symbol", name) for name, f in functions(family).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_objects, "compile_kernels", keep)
        tvm.compile(tvm.IRModule(named), target=target.tvm_target)
    [found] = kept
    return found


def described(assembly):
    """The assembly and the metadata, field by field, of each kernel."""
    found = {}
    for text in re.split(r"^  - (?=\.a)", assembly.split("amdhsa.kernels:")[1], flags=re.M)[1:]:
        fields = dict(re.findall(r"^ *(\.\w+): +(\S+)$", re.sub(r"(?m)^ {6,}.*$", "", text), re.M))
        name = fields[".symbol"].removesuffix(".kd")
        body = re.search(rf"^{name}:\n(.*?)^\t\.section", assembly, re.M | re.S)
        found[name] = body[1], fields
    return found


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES, ids=lambda v: str(v)[:7])
def test_machine_code_is_what_it_has_to_be(target, family, architecture):
    kernels, objects = target[family.features.subgroup]
    threads = {kernel.name: kernel.threads for kernel in kernels}
    mine = [item for item in objects if item.architecture == architecture]
    found = {}
    for item in mine:
        assert item.code[:4] == b"\x7fELF"
        assert (item.code[7], item.code[8]) == (64, 3)  # HSA's, code objects of version 5
        assert struct.unpack_from("<I", item.code, 48)[0] & 0xFF == MACHINES[architecture]
        found |= described(item.assembly)
    assert set(found) == set(threads)
    assert max(threads.values()) == 1024  # that of long rows
    for name, (body, fields) in found.items():
        # As many registers as a block of its size may have, and no memory in place of one.
        assert int(fields[".max_flat_workgroup_size"]) == threads[name], name
        assert int(fields[".wavefront_size"]) == family.features.subgroup, name
        assert fields[".vgpr_spill_count"] == fields[".private_segment_fixed_size"] == "0", name
        assert int(fields[".group_segment_fixed_size"]) <= family.features.shared_bytes, name
        # A wavefront must not reach a barrier before its stores have reached shared memory.
        for before in re.findall(r"((?:.*\n){12})\ts_barrier", body):
            stores = re.split(r"s_waitcnt (?:.*)?lgkmcnt\(0\)", before)[-1]
            assert not re.search(r"\bds_(write|store)", stores), (name, before)


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES, ids=lambda v: str(v)[:7])
def test_products_use_matrix_instructions_and_load_sixteen_bytes(target, family, architecture):
    _, objects = target[family.features.subgroup]
    found = {}
    for item in objects:
        if item.architecture == architecture:
            found |= {name: body for name, (body, _) in described(item.assembly).items()}
    names = INSTRUCTIONS[architecture]
    products = {n: b for n, b in found.items() if re.match(r"matrix_|experts_q4", n)}
    multiplying = {n: b for n, b in products.items() if "v_mfma" in b or "v_wmma" in b}
    # Of a projection all but the launch that rounds activations; of experts one of four.
    counts = {kind: sum(n.startswith(kind) for n in multiplying) for kind in ("matrix_", "experts")}
    assert counts == {"matrix_": 2 * len(family.matrix.kernels), "experts": 1}
    for name, body in multiplying.items():
        assert names["bf16" if "bf16" in name else "q4"] in body, name
    for name in ("gemv_kernel", "few_kernel", "few_experts_kernel", *multiplying):
        assert re.search(LOADS, found[name]), name


def test_rules_keep_exact_products_for_float32_and_few_tokens(rocm):
    tokens = tvm.tirx.Var("T", "int64")
    rules = RocmTarget().kernel_rules

    def rule(op, max_tokens, **shapes):
        types = {name: tvm.relax.TensorType(shape, "float32") for name, shape in shapes.items()}
        site = Site(
            op=op, types=types, max_tokens=max_tokens, tokens=None, num_groups=1, page_size=16
        )
        return next(found for found, make in rules if make(site) is not None)

    product = {"x": [1, tokens, 64], "weight": [96, 64]}
    experts = {"x": [tokens, 64], "weight": [4, 96, 64], "expert_ids": [tokens, 2]}
    assert rule(dialect.Linear(format="q4_0"), 512, **product) == "rocm.matrix"
    assert rule(dialect.Linear(format="q4_0"), 8, **product) == "gpu.few"
    assert rule(dialect.Linear(format="f32"), 512, **product) == "gpu.gemm"
    assert rule(dialect.GroupedLinear(format="bf16"), 512, **experts) == "rocm.matrix_experts"
    assert rule(dialect.GroupedLinear(format="f32"), 512, **experts) == "gpu.experts"
    assert rule(dialect.GroupedLinear(format="bf16"), 8, **experts) == "gpu.few_experts"


@pytest.mark.parametrize("level", ["gfx000", "gfx906", "gfx942,", "sm_90", "gfx90a gfx942"])
def test_an_unknown_architecture_is_named_with_those_that_exist(rocm, level):
    with pytest.raises(UsageError, match="unknown ROCm architecture") as caught:
        RocmTarget(level)
    assert "gfx90a, gfx942, gfx1100" in (caught.value.hint or "")


def test_architectures_of_two_families_are_two_artifacts(rocm):
    with pytest.raises(UsageError, match="one artifact cannot serve both gfx90a, gfx942 and gfx1"):
        RocmTarget("gfx942,gfx1100")


def test_a_missing_linker_is_named_with_the_command_that_brings_it(rocm, monkeypatch):
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(linker.shutil, "which", lambda _: None)
    with pytest.raises(CompileError, match=r"needs ld.lld.*\nhint: pip install"):
        RocmTarget()
    with pytest.raises(CompileError, match=r"needs ld\.lld"):
        linker.link_code_object(b"")
    monkeypatch.setattr(registry, "_COMPILE_PACKAGES", ())
    [status] = [s for s in registry.list_targets() if s.name == "rocm"]
    assert not status.can_build
    assert "linking kernels needs ld.lld" in status.reasons


def test_what_the_linker_refuses_is_said_in_its_words(rocm):
    with pytest.raises(CompileError, match=r"ld.lld failed: .*kernels.o"):
        linker.link_code_object(b"nonsense")
