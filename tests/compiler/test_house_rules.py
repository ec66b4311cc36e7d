"""Two rules of the house: no model has code of its own, and artifacts call compiled code only."""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as TIR

import llmc
from llmc.compiler.compile import _codegen
from llmc.compiler.pipeline import StepBounds, from_trace, graph_phases, lower_memory, lower_to_vm
from llmc.compiler.schemes import scheme_of
from llmc.targets.registry import open_target

ROOT = Path(llmc.__file__).parent.parent

# Names of model types that are words of English or of this trade. A line about bits, clipped
# values, aligned bytes or beams of a search is not about a model.
WORDS = {"align", "beam", "bit", "canary", "clip", "codegen", "funnel", "git", "led", "opt"}
# Works whose formulas or tables are cited in docstrings and comments: the repetition penalty, the
# rotation, the byte alphabet. In code they are names of models like any other.
CITED = {"ctrl", "gpt2", "roformer"}


def model_names() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {name.lower() for name in CONFIG_MAPPING_NAMES} - WORDS


def _pattern(names: set[str]) -> re.Pattern[str]:
    """The names as whole words; `gpt2`, `gpt-2` and `gpt_2` are one name."""

    def spelled(name: str) -> str:
        parts = re.findall(r"[a-z]+|\d+|[^a-z\d]+", name)
        return "[-_]?".join(re.escape(p) for p in parts if p.isalnum())

    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<![a-z\d])({'|'.join(map(spelled, longest_first))})(?![a-z\d])")


def names_in(source: str, names: set[str]) -> set[str]:
    """The model names in Python `source`: in identifiers, strings and prose."""
    pattern = _pattern(names)
    found: set[str] = set()
    statement_begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_prose = token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and statement_begins
        )
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement_begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        text = token.string
        apart = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", text).lower()
        seen = {re.sub("[-_]", "", n) for t in (apart, text.lower()) for n in pattern.findall(t)}
        found |= seen - CITED if is_prose else seen
    return found


@pytest.mark.parametrize("folder", ["models", "compiler", "runtime"])
def test_no_model_is_named_in_the_code(folder):
    """A model that needs a line of its own would be the first of many."""
    names = model_names()
    assert len(names) > 300
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        named = names_in(path.read_text(encoding="utf-8"), names)
        if named:
            found[str(path.relative_to(ROOT))] = sorted(named)
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'if config.model_type == "llama":',
        "class LlamaAttention: pass",
        "convert_gpt2_weights = 1",
        "x = 1  # as Qwen3-MoE does",
        "SPECIAL = {'qwen2_moe': 1}",
        "ctrl = 1",
    ],
)
def test_a_model_name_is_found_however_it_is_written(line):
    assert names_in(line + ("\n    pass\n" if line.endswith(":") else "\n"), model_names())


@pytest.mark.parametrize(
    "line",
    ["values.clip(0, 1)", '"""As in CTRL (Keskar et al. 2019)."""', "x = 1  # GPT-2, RoFormer"],
)
def test_words_and_citations_are_not_model_names(line):
    assert not names_in(line + "\n", model_names())


# What an artifact calls.

CALLBACKS = re.compile(
    r"\b(?:call_packed|call_cpacked|tvm_call_packed\w*|call_extern|call_pure_extern)\b"
)
OWN_LLVM = re.compile(r'call_(?:pure_)?extern\("\w+", "llmc_\w+"')
# The C library's memory, math and threads, which every process has.
C_LIBRARY = """
    memcpy memmove memset snprintf
    clock_gettime sched_yield sigfillset
    pthread_attr_destroy pthread_attr_init pthread_attr_setstacksize pthread_cond_broadcast
    pthread_cond_wait pthread_create pthread_getspecific pthread_join pthread_key_create
    pthread_key_delete pthread_mutex_lock pthread_mutex_trylock pthread_mutex_unlock pthread_self
    pthread_setname_np pthread_setspecific pthread_sigmask
    acos asin atan atan2 ceil cos cosh erf exp exp2 fabs floor fma fmod log log1p log2 nearbyint pow
    round sin sinh sqrt tan tanh trunc
"""
LIBC = {name + width for name in C_LIBRARY.split() for width in ("", "f")}


def foreign_calls(lowered: tvm.IRModule, executable: relax.VMExecutable) -> set[str]:
    """What the executable calls that is neither TVM's own builtin nor a function of the module."""
    own = {g.name_hint for g in lowered.get_global_vars()}
    own |= {str(f.attrs["global_symbol"]) for f in lowered.functions.values()
            if f.attrs and "global_symbol" in f.attrs}  # fmt: skip
    [listed] = re.findall(r"Globals \(#\d+\): \[(.*?)\]", executable.stats())
    called = set(listed.split(", "))
    # VMShapeLower writes its functions itself, while the executable is built.
    found = {
        name
        for name in called - own
        if not name.startswith("vm.builtin.") and not re.fullmatch(r"shape_func\d*", name)
    }
    for name, func in lowered.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc):
            text = func.script()
            if "pragma_import_llvm" in text:  # what a kernel brings with it is compiled into it
                text = OWN_LLVM.sub("", text)
            found |= {f"{call} in {name.name_hint}" for call in CALLBACKS.findall(text)}
    return found


@pytest.fixture(scope="module", params=["w4a16-g32", "w4a8-g32", "bf16"])
def compiled(request):
    """A small dense model, lowered and built for the CPU, for each type of activations."""
    if request.param == "w4a8-g32" and "int8" not in open_target("cpu").narrow_products:
        pytest.skip("this CPU has no dot products of bytes")
    from transformers import AutoConfig

    from llmc.models.trace import trace

    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    target = open_target("cpu")
    scheme = scheme_of(request.param).resolved("cpu", target.narrow_products)
    mod = from_trace(trace(config))
    bounds = StepBounds(max_tokens=16, max_sequences=4, max_logits_rows=4)
    phases = graph_phases(target, scheme.choose({}), scheme.activations, "float16", bounds)
    with target.tvm_target:
        for _, phase in phases:
            mod = phase(mod)
        lowered = lower_memory(lower_to_vm(mod))
        return target, lowered, _codegen(lowered, target)


def test_a_compiled_model_calls_compiled_functions_and_builtins_only(compiled):
    """No Python, no NumPy, no library that the serving machine would have to have."""
    _, lowered, executable = compiled
    assert not foreign_calls(lowered, executable)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF library")
def test_the_library_needs_nothing_but_the_runtime_and_the_c_library(compiled, tmp_path):
    target, _, executable = compiled
    path = tmp_path / target.library_name
    target.link(executable, path)
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    known = {s for s in symbols if s.startswith(("TVM", "_ITM_", "__"))} | LIBC
    assert symbols - known == set()


def test_a_callback_in_the_graph_or_in_a_kernel_is_found():
    @I.ir_module
    class Module:
        @TIR.prim_func(s_tir=True)
        def kernel(x: TIR.Buffer((4,), "float32"), y: TIR.Buffer((4,), "float32")):
            TIR.func_attr({"global_symbol": "kernel"})
            TIR.evaluate(TIR.call_packed("llmc.test.inside", x[0], y[0]))

        @R.function
        def main(x: R.Tensor((4,), "float32")):
            R.func_attr({"global_symbol": "main"})
            y = R.call_dps_packed("llmc.test.callback", (x,), out_ty=R.Tensor((4,), "float32"))
            z = R.call_tir(Module.kernel, (y,), out_ty=R.Tensor((4,), "float32"))
            return z

    target = open_target("cpu")
    with target.tvm_target:
        lowered = lower_memory(lower_to_vm(Module))
        found = foreign_calls(lowered, _codegen(lowered, target))
    assert "llmc.test.callback" in found
    assert any(name.endswith("in kernel") for name in found)
