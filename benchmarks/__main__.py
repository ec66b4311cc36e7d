"""`python -m benchmarks`: measures compiled models beside its peers and writes the page."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import psutil

from benchmarks import llama_cpp
from benchmarks.cli import cache_option, explained, llama_cpp_option
from benchmarks.engine import Engine, Plan
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.models import REPOSITORY, Files, choose_cases, prepare
from benchmarks.own import Own
from benchmarks.peers import LLAMA_CPP, PEERS, choose_peers, open_peers
from benchmarks.process import run
from benchmarks.record import Record, load_average
from benchmarks.session import PAGE_FILE, RECORD_FILE, Session, publish
from llmc import __version__
from llmc.artifact import Manifest
from llmc.cli.bench import cpu_name
from llmc.cli.console import console
from llmc.cli.profile import measure_limits
from llmc.cpu_features import num_cores
from llmc.errors import LlmcError

_QUICK_MODELS = "smollm2,llama-1b-q4_0"
_BUSY = 0.5  # load a CPU above which figures are noise


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--models", default="smollm2,llama-1b", help="Names or their beginnings.")
@click.option("--peers", default=LLAMA_CPP, help=f"Of {', '.join(PEERS)}, comma-separated.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, help="Rounds.")
@click.option("--gen-tokens", type=click.IntRange(min=4), default=32, help="Tokens a sequence.")
@click.option("--quick", is_flag=True, help=f"A short round of {_QUICK_MODELS}, into the cache.")
@click.option("--page-only", is_flag=True, help="Make the page from the record again.")
@cache_option
@llama_cpp_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=REPOSITORY / "docs" / "benchmarks",
    show_default="docs/benchmarks",
    help="Where the page goes.",
)
def bench_cpu(
    models: str,
    peers: str,
    repeat: int,
    gen_tokens: int,
    quick: bool,
    page_only: bool,
    cache: Path,
    peer_folder: Path | None,
    out: Path,
) -> None:
    """Measures llmc and its peers in turns on this machine's CPU."""
    talk = console(err=True)
    if quick:
        models, repeat, gen_tokens, out = _QUICK_MODELS, 1, 8, cache / "quick"
    if page_only:
        publish(Record.load(out / RECORD_FILE), out)
        return
    cases, names = choose_cases(models), choose_peers(peers)
    out.mkdir(parents=True, exist_ok=True)
    # Needed whatever the peers are: it quantizes the models.
    programs = LlamaCpp.find(peer_folder) if peer_folder else llama_cpp.build(cache, talk.print)
    files = [prepare(case, cache, programs, talk.print) for case in cases]
    engines = [Own(version=_version()), *open_peers(names, programs, cache, talk.print)]
    threads = min(psutil.cpu_count(logical=False) or 1, num_cores())
    plan = Plan(threads=threads, gen_tokens=gen_tokens)
    if load_average() > _BUSY * threads:
        talk.print(f"[yellow]load is {load_average():.1f}: the figures will say little")
    talk.print("measuring the machine")
    manifests = {f.case.name: Manifest.load(f.artifact) for f in files}
    session = Session(
        record=_new_record(files, manifests, engines, plan, repeat),
        manifests=manifests,
        engines=engines,
        plan=plan,
        out=out,
        cache=cache,
        talk=talk,
    )
    try:
        session.measure(files, repeat)
    finally:  # what there is, when interrupted
        publish(session.record, out)
    talk.print(str(out / PAGE_FILE))


def _new_record(
    files: Sequence[Files],
    manifests: Mapping[str, Manifest],
    engines: Sequence[Engine],
    plan: Plan,
    repeat: int,
) -> Record:
    memory_gib = psutil.virtual_memory().total / 2**30
    setting = {
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{cpu_name()}, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}",
        "threads": plan.threads,
        "repeat": repeat,
        "gen_tokens": plan.gen_tokens,
        "engines": list(dict.fromkeys(engine.version for engine in engines)),
    }
    cases = {}
    for one in files:
        manifest = manifests[one.case.name]
        cases[one.case.name] = {
            "title": one.case.title,
            "weights_bytes": manifest.memory.weights_bytes,
            "kv_bytes_per_token": manifest.memory.kv_bytes_per_token,
            "num_parameters": manifest.model.num_parameters,
            "gguf_bytes": one.gguf.stat().st_size,
        }
    limits = dataclasses.asdict(measure_limits())
    return Record(setting=setting, limits=limits, cases=cases)


def _version() -> str:
    try:
        commit = run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY).stdout.strip()
    except LlmcError:  # an archive without its history
        commit = "unknown"
    tvm = importlib.metadata.version("apache-tvm")
    return f"llmc {__version__} ({commit}), TVM {tvm}"


if __name__ == "__main__":
    explained(bench_cpu, "python -m benchmarks")
