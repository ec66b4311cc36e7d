"""What no program can beat on this machine: bytes that have to be read, operations to be done."""

from __future__ import annotations

from benchmarks.engine import BATCH_PROMPT_TOKENS, BATCHES, PREFILL_TOKENS
from benchmarks.record import METRICS
from llmc.artifact import Manifest
from llmc.cli.kernel_cost import KernelCost, Limits


def floors(
    manifest: Manifest, limits: Limits, *, depths: tuple[int, ...], gen: int
) -> dict[str, float]:
    """The best possible figure of each metric, in its unit; metrics without one are left out.

    Every weight is read once a step, every visible key and value once a sequence. Products count
    two operations a weight and token, in the fastest precision that the weights' format allows;
    attention's own operations are left out, and the embedding counts as the output projection that
    it is tied to.
    """
    model, memory = manifest.model, manifest.memory
    precision = "bf16" if manifest.quantization == "bf16" else "int8"
    head = model.vocab_size * model.hidden_size

    def seconds(tokens: int, logits_rows: int, context_tokens: float) -> float:
        inner = model.num_parameters - head
        cost = KernelCost(
            memory_bytes=memory.weights_bytes + context_tokens * memory.kv_bytes_per_token,
            activation_bytes=0,
            operations=2.0 * (tokens * inner + logits_rows * head),
            precision=precision,
        )
        return limits.floor_s(cost)

    best = {"prefill": PREFILL_TOKENS / seconds(PREFILL_TOKENS, 1, 0)}
    for depth in depths:
        best[f"decode-{depth}"] = 1 / seconds(1, 1, depth + gen / 2)
    for batch in BATCHES:
        context = batch * (BATCH_PROMPT_TOKENS + gen / 2)
        best[f"batch-{batch}"] = batch / seconds(batch, batch, context)
    best["memory"] = memory.weights_bytes / 2**20
    assert best.keys() <= METRICS.keys()
    return best
