"""Measures one engine that is a Python library; runs in that engine's own environment.

    python python_driver.py ENGINE MODEL --prompt-tokens N --gen-tokens N --batch 4,16

prints {"results": [{"batch", "prefill_tokens_per_s", "decode_tokens_per_s"}]} as its last line.
Nothing of llmc's is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

MAX_TOKENS = 2048  # of a sequence
KV_CACHE_BYTES = 1 << 30
SMALLEST_VOCABULARY = 30_000  # of the models here: every id below means something

Prompts = list[list[int]]
# Generates so many tokens a prompt; seconds to the first of all and from there to the last.
Generate = Callable[[Prompts, int], tuple[float, float]]


def open_vllm(model: str, threads: int) -> Generate:
    """vLLM in this very process; what it compiles is kept in its environment."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # what it keeps so, it does not load again
    os.environ["VLLM_CACHE_ROOT"] = f"{sys.prefix}/cache"
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the next line loads PyTorch
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=False,  # so that outputs say when their tokens came
    )

    def generate(prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        times = [out.metrics for out in engine.generate(inputs, sampling, use_tqdm=False)]
        started = min(t.queued_ts for t in times)
        first = max(t.first_token_ts for t in times)
        return first - started, max(t.last_token_ts for t in times) - first

    return generate


def open_openvino(model: str, threads: int) -> Generate:
    """OpenVINO GenAI's pipeline over a GGUF file."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        config = openvino_genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = num_tokens
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        metrics = pipeline.generate(inputs, config).perf_metrics
        raw = metrics.raw_metrics
        times = raw.m_new_token_times  # one a step, whatever the batch
        return metrics.get_ttft().mean / 1e3, (times[-1] - times[0]) / 1e3  # from ms

    return generate


OPENERS: dict[str, Callable[[str, int], Generate]] = {
    "vllm": open_vllm,
    "openvino": open_openvino,
}


def measure(generate: Generate, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The speeds of a batch, after a warm-up with other prompts where one is wanted."""
    draw = random.Random(batch)

    def prompts() -> Prompts:
        shape = range(batch), range(options.prompt_tokens)
        return [[draw.randrange(3, SMALLEST_VOCABULARY) for _ in shape[1]] for _ in shape[0]]

    if options.warm_up:
        generate(prompts(), options.gen_tokens)
    first_s, others_s = generate(prompts(), options.gen_tokens)
    steps = options.gen_tokens - 1
    return {
        "batch": batch,
        "prefill_tokens_per_s": batch * options.prompt_tokens / first_s,
        "decode_tokens_per_s": batch * steps / others_s if steps else None,
    }


def main() -> None:
    """Measures every batch size and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=OPENERS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--gen-tokens", type=int, required=True)
    parser.add_argument("--batch", default="1")
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    generate = OPENERS[options.engine](options.model, options.threads)
    batches = [int(part) for part in options.batch.split(",")]
    print(json.dumps({"results": [measure(generate, b, options) for b in batches]}))  # noqa: T201


if __name__ == "__main__":
    main()
