"""`python -m benchmarks.gpu_peers`: what PyTorch reaches on this machine's GPU, as a peer.

transformers' own Llama, made-up bfloat16 weights, a static cache and `torch.compile`, at the shapes
that docs/benchmarks/h200.md measures llmc with. Needs torch and transformers, nothing of llmc's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import click

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="1b", help="Of Llama 3.")
@click.option("--batch", "batches", default="1,16", help="Batch sizes to measure.")
@click.option("--prompt-tokens", default=1000, help="Tokens of each prompt.")
@click.option("--gen-tokens", default=64, help="Steps of decoding that are timed.")
@click.option("--repeat", default=3, help="Measurements.")
def main(shape: str, batches: str, prompt_tokens: int, gen_tokens: int, repeat: int) -> None:
    """Print tokens a second of prefill and decode, median (least … most)."""
    import torch
    import transformers

    click.echo(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    config = transformers.LlamaConfig(
        **COMMON, **SHAPES[shape], max_position_embeddings=8192, dtype=torch.bfloat16
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for batch in (int(part) for part in batches.split(",")):
        for name, figures in _measure(model, batch, prompt_tokens, gen_tokens, repeat).items():
            low, high = min(figures), max(figures)
            median = statistics.median(figures)
            click.echo(f"{shape} batch {batch:3} {name}: {median:,.0f} ({low:,.0f} … {high:,.0f})")


def _measure(
    model: Any,  # noqa: ANN401 - transformers is imported late
    batch: int,
    prompt_tokens: int,
    gen_tokens: int,
    repeat: int,
) -> dict[str, list[float]]:
    import torch
    import transformers

    cache = transformers.StaticCache(
        config=model.config, max_cache_len=prompt_tokens + gen_tokens + 8
    )
    prompt = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), device="cuda")
    token = prompt[:, :1].contiguous()
    position = torch.full((1,), prompt_tokens, device="cuda")

    def decode(token: Any, position: Any) -> Any:  # noqa: ANN401
        logits = model(token, past_key_values=cache, cache_position=position, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def prefill() -> None:
        cache.reset()
        model(
            prompt,
            past_key_values=cache,
            cache_position=torch.arange(prompt_tokens, device="cuda"),
            use_cache=True,
            logits_to_keep=1,
        )

    step = torch.compile(decode, mode="reduce-overhead", fullgraph=False)

    def steps() -> None:
        now, at = token, position.clone()
        for _ in range(gen_tokens):
            torch.compiler.cudagraph_mark_step_begin()
            now = step(now, at).clone()
            at += 1

    with torch.inference_mode():
        for _ in range(2):
            prefill()  # steps would run past the end of a cache that is not begun again
            steps()
        found: dict[str, list[float]] = {"prefill, tokens/s": [], "decode, tokens/s": []}
        for _ in range(repeat):
            found["prefill, tokens/s"].append(batch * prompt_tokens / _seconds(prefill))
            found["decode, tokens/s"].append(batch * gen_tokens / _seconds(steps))
    return found


def _seconds(run: Callable[[], None]) -> float:
    import torch

    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


if __name__ == "__main__":
    main()
