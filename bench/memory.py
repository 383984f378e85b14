# SPDX-License-Identifier: Apache-2.0
"""How much memory does a long prompt take? Peak resident memory of prefill and decode, each cache in its own process.

The model is Llama-shaped with random weights (memory does not depend on what they say), bf16, and gets the prompt in
short chunks; logits are computed for the last token alone. Variants: `dynamic` is transformers' DynamicCache
with sdpa; `razor` a plan with SHARE of the kv heads full, the others 4 + 4000 + compensation, streaming prefill;
`control` runs the same chunks with no cache at all, so that activations can be told apart.

Growth is the peak resident size minus that right before the prompt, after a short warm-up call.

Example: python -m razor_attention.bench.memory --length 32768
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from razor_attention import Plan, RazorCache, attach
from razor_attention.hf.cache import cache_bytes
from razor_attention.hf.names import CACHE

from .cases import SHARE, random_plan
from .harness import RESULTS, Row, Timing, append_rows, make_row, table, timing
from .resident import Peak, status_bytes

VARIANTS = ("dynamic", "razor", "control")
CHUNK = 256  # tokens of the prompt in one call; more would drown the cache in activations
DECODE_STEPS = 64
TARGET = 0.45  # of DynamicCache's growth


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; 90 million parameters by default."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    vocab_size: int = 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """What one variant took."""

    variant: str
    length: int  # tokens of the prompt
    growth_bytes: int  # peak of prefill and decode
    prefill_growth_bytes: int  # peak of the prefill alone
    cache_bytes: int  # what the cache says it holds at the end
    prefill_us: float
    step_us: list[float]  # of each decode step


def new_model(shape: Shape) -> Any:
    """A LlamaForCausalLM with random weights in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=1 << 20,
    )
    auto: Any = AutoModelForCausalLM  # untyped
    model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.eval()


def razor_plan(shape: Shape) -> Plan:
    """SHARE of the kv heads full, the others 4 + 4000 + compensation."""
    return random_plan(shape.num_layers, shape.num_kv_heads, SHARE)


def measure(
    variant: str, length: int, *, chunk: int = CHUNK, steps: int = DECODE_STEPS, shape: Shape | None = None
) -> Usage:
    """Run one variant in this process.

    Args:
        variant: one of VARIANTS.
        length: tokens of the prompt.
        chunk: tokens of it in one call.
        steps: tokens generated after it.
        shape: of the model.
    """
    shape = shape or Shape()
    model = new_model(shape)
    ids = torch.randint(shape.vocab_size, (1, length + steps), generator=torch.Generator().manual_seed(0))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if variant == "razor":
            plan = razor_plan(shape)
            stack.enter_context(attach(model, plan, prefill="streaming"))

        def new_cache() -> Any:
            if variant == "control":
                return None
            if variant == "razor":
                return RazorCache(model.config, plan, prefill="streaming", prompt_len=length)
            return DynamicCache(config=model.config)

        def forward(tokens: torch.Tensor, cache: Any) -> None:
            hidden = model.model(tokens, **{CACHE: cache}, use_cache=cache is not None).last_hidden_state
            model.lm_head(hidden[:, -1])

        if variant == "control":  # razor attention would refuse to run without a cache
            model.set_attn_implementation("sdpa")
        forward(ids[:, :16], new_cache())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # so that pages freed so far do not hide growth
        cache, before = new_cache(), status_bytes("VmRSS")
        with Peak().start() as peak:
            begin = time.perf_counter()
            starts = range(0, length, chunk)
            for start in tqdm(starts, desc=f"{variant}: prefill", unit="chunk", disable=None, leave=False):
                forward(ids[:, start : min(start + chunk, length)], cache)
            prefill_us = (time.perf_counter() - begin) * 1e6
            prefill_growth, step_us = peak.bytes() - before, []
            for at in range(length, length + steps):
                begin = time.perf_counter()
                forward(ids[:, at : at + 1], cache)
                step_us.append((time.perf_counter() - begin) * 1e6)
            growth = peak.bytes() - before
    return Usage(
        variant, length, growth, prefill_growth, 0 if cache is None else cache_bytes(cache), prefill_us, step_us
    )


def measure_apart(variant: str, length: int, chunk: int, threads: int) -> Usage:
    """The same in a process of its own."""
    sizes = {"--length": length, "--chunk": chunk, "--threads": threads}
    flags = ["--variant", variant, *(str(part) for pair in sizes.items() for part in pair)]
    command = [sys.executable, "-m", "razor_attention.bench.memory", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def rows_of(usage: Usage, on: str | None) -> list[Row]:
    """Bytes are the growth for the prefill, and what the cache holds for a decode step."""
    prefill, step = Timing(usage.prefill_us, 0.0), timing(usage.step_us)
    return [
        make_row("memory", f"prefill {usage.length}", usage.variant, prefill, nbytes=usage.growth_bytes, on=on),
        make_row("memory", f"decode {usage.length}", usage.variant, step, nbytes=usage.cache_bytes, on=on),
    ]


def summary(usages: list[Usage]) -> str:
    """A table, and the verdict on TARGET where both caches were measured."""
    header = ("variant", "growth MB", "of prefill", "cache MB", "prefill s", "step ms")
    cells = [
        (
            u.variant,
            u.growth_bytes / 1e6,
            u.prefill_growth_bytes / 1e6,
            u.cache_bytes / 1e6,
            u.prefill_us / 1e6,
            timing(u.step_us).median_us / 1e3,
        )
        for u in usages
    ]
    text = table(header, cells, left=1)
    by_name = {usage.variant: usage for usage in usages}
    if {"razor", "dynamic"} <= set(by_name):
        razor, dynamic = by_name["razor"], by_name["dynamic"]
        text += (
            f"\npeak growth of razor: {razor.growth_bytes / dynamic.growth_bytes:.2f} of dynamic's, "
            f"{razor.growth_bytes / dynamic.cache_bytes:.2f} of dynamic's cache alone (target {TARGET})"
        )
    return text


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--length", type=int, default=32768, help="tokens of the prompt (default: 32768)")
    flags.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens of it in one call (default: {CHUNK})")
    flags.add_argument("--variant", choices=VARIANTS, help="measure one in this process and print it as JSON")
    flags.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    flags.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    flags.add_argument("--machine", default=None, help="name of this machine in them")
    arguments = flags.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.variant:
        print(json.dumps(asdict(measure(arguments.variant, arguments.length, chunk=arguments.chunk))))
        return
    usages = [measure_apart(variant, arguments.length, arguments.chunk, arguments.threads) for variant in VARIANTS]
    print(summary(usages))
    rows = [row for usage in usages for row in rows_of(usage, arguments.machine)]
    print(f"appended to {append_rows(rows, arguments.results)}")


if __name__ == "__main__":
    main()
