# SPDX-License-Identifier: Apache-2.0
"""How fast is a whole generate()? A Llama-shaped model with a long prompt, its caches side by side in one process.

The model is that of memory.py (random weights, bf16). All variants share its weights:

    dynamic   transformers' DynamicCache with sdpa
    razor     a plan with SHARE of the kv heads full, the others 4 + 4000 + compensation, streaming prefill;
              `razor int8` and `razor int4` (--kv) store rows so
    kvpress   NVIDIA kvpress' DuoAttentionPress with the same heads, sinks and windows, if it can be imported. It hides
              keys, frees nothing, and compresses only what comes in one call: its prompt is not cut into chunks
    model     one token without any cache: the floor of a step

The prompt goes through generate() in chunks. Then the variants take turns, each with a generate() of TURN tokens that
continues its own cache; a step is the time between two tokens of one call. Before that, the razor cache with a full
plan must choose the same tokens as DynamicCache on a short prompt.

Example: python -m razor_attention.bench.generate --length 32768
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from razor_attention import Plan, RazorCache, attach
from razor_attention.hf.cache import cache_bytes
from razor_attention.hf.names import CACHE

from .cases import QUANTISED, rows_read, rows_read_by_prompt
from .harness import Row, Timing, make_row, measured, parser, report, timing
from .memory import Shape, new_model, razor_plan

CHUNK = 1024  # tokens of the prompt in one call
TURN = 9  # tokens of a turn: 8 steps between them
TARGET = 5.0  # times dynamic's step


class Clock:
    """A streamer for generate() that notes when tokens come: the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def first_us(self) -> float:
        """Microseconds from the call to its first token."""
        return (self.times[1] - self.times[0]) * 1e6

    def steps_us(self) -> list[float]:
        """Microseconds of each further token."""
        return [(b - a) * 1e6 for a, b in zip(self.times[1:], self.times[2:], strict=False)]


@dataclass(slots=True)
class Variant:
    """A model with its own way to attend, its cache, and what it took."""

    model: Any
    cache: Any
    plan: Plan | None  # that the cache follows; None: full
    ids: Tensor  # [1, tokens] int64: the prompt and what was generated
    kv_dtype: str = "bf16"  # format of the cached rows
    prefill_us: float = 0.0
    held_bytes: int = 0  # by the cache after the prompt
    step_us: list[float] = field(default_factory=list)

    def generate(self, count: int, **options: Any) -> Clock:
        """`count` more tokens."""
        clock = Clock()
        mask = torch.ones_like(self.ids)
        options |= {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        self.ids = self.model.generate(self.ids, attention_mask=mask, **{CACHE: self.cache}, streamer=clock, **options)
        return clock


def twin(model: Any) -> Any:
    """A model of its own with the same weights, so that one can be switched to another attention."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def press_of(plan: Plan) -> Any:
    """kvpress' DuoAttentionPress with the plan's heads; None without kvpress."""
    if importlib.util.find_spec("kvpress") is None:
        return None
    from kvpress import DuoAttentionPress  # type: ignore[import-not-found]

    compressed = ~plan.is_full
    first = tuple(compressed.nonzero()[0])

    class PlanPress(DuoAttentionPress):  # type: ignore[misc]  # untyped
        def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
            """It reads these from a repository, for six models; a score of 1 stands for a full head."""
            return int(plan.sink_size[first]), int(plan.window_size[first]), plan.is_full.double().numpy()

    return PlanPress(head_compression_ratio=float(compressed.double().mean()))


def prefill(variant: Variant, chunk: int, press: AbstractContextManager[object] | None = None) -> None:
    """The prompt and one token."""
    if press is None:
        clock = variant.generate(1, prefill_chunk_size=chunk)
        variant.prefill_us = clock.first_us()
    else:
        with press, torch.no_grad():  # cache_position: transformers < 5.3 passed it, and the press reads it
            begin = time.perf_counter()
            where = torch.arange(variant.ids.shape[1])
            hidden = variant.model.model(
                variant.ids, **{CACHE: variant.cache}, use_cache=True, cache_position=where
            ).last_hidden_state
            token = variant.model.lm_head(hidden[:, -1:]).argmax(-1)
            variant.prefill_us = (time.perf_counter() - begin) * 1e6
        variant.ids = torch.cat([variant.ids, token], 1)
    variant.held_bytes = cache_bytes(variant.cache)


def check_full_plan(model: Any, shape: Shape, chunk: int) -> None:
    """Stop unless the razor cache with a full plan generates what DynamicCache does.

    In float32: in bfloat16 two near-equal logits of a random model soon change places, whoever attends.

    Raises:
        RuntimeError: generate: expected the tokens of DynamicCache with a full plan, got 7 of 16
    """
    ids = torch.randint(shape.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    plan = Plan.full(shape.num_layers, shape.num_kv_heads)
    model = copy.deepcopy(model).float()
    other = twin(model)
    pair = [Variant(model, DynamicCache(config=model.config), None, ids)]
    pair.append(Variant(other, RazorCache(model.config, plan, prefill="streaming"), plan, ids))
    with attach(other, plan, prefill="streaming"):
        for variant in pair:
            variant.generate(16, prefill_chunk_size=chunk)
    alike = int((pair[0].ids == pair[1].ids)[0, 200:].cumprod(0).sum())
    if alike < 16:
        raise RuntimeError(f"generate: expected the tokens of DynamicCache with a full plan, got {alike} of 16")


def generate(
    length: int,
    *,
    rounds: int,
    chunk: int = CHUNK,
    shape: Shape | None = None,
    kv_dtypes: Sequence[Literal["int8", "int4"]] = (),
    on: str | None = None,
) -> list[Row]:
    """Time the prompt of every variant, then their steps in turns.

    Args:
        length: tokens of the prompt.
        rounds: turns of each variant.
        chunk: tokens of the prompt in one call.
        shape: of the model.
        kv_dtypes: a razor variant more for each.
    """
    shape = shape or Shape()
    model, plan = new_model(shape), razor_plan(shape)
    ids = torch.randint(shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ours = twin(model)
    check_full_plan(model, shape, chunk)
    variants = {
        "dynamic": Variant(model, DynamicCache(config=model.config), None, ids),
        "razor": Variant(ours, RazorCache(ours.config, plan, prefill="streaming", prompt_len=length), plan, ids),
    }
    for kv_dtype in kv_dtypes:
        cache = RazorCache(ours.config, plan, prefill="streaming", prompt_len=length, kv_dtype=kv_dtype)
        variants[f"razor {kv_dtype}"] = Variant(ours, cache, plan, ids, kv_dtype)
    press = press_of(plan)
    if press is not None:
        pressed = twin(model)
        variants["kvpress"] = Variant(pressed, DynamicCache(config=model.config), None, ids)
    floor: list[float] = []
    with attach(ours, plan, prefill="streaming"):
        shown: dict[str, Any] = {"disable": None, "leave": False}
        for name, variant in tqdm(variants.items(), desc="prompts", unit="variant", **shown):
            prefill(variant, chunk, press(variant.model) if name == "kvpress" else None)
        turns: dict[str, Callable[[], None]] = {
            name: lambda variant=variant: variant.step_us.extend(variant.generate(TURN).steps_us())
            for name, variant in variants.items()
        }
        turns["model"] = lambda: floor.extend(_alone(model, ids[:, :1]) for _ in range(TURN - 1))
        for turn in turns.values():  # a page or a tensor may grow in a first step
            turn()
        for values in (floor, *(variant.step_us for variant in variants.values())):
            values.clear()
        names = list(turns)
        for start in tqdm(range(rounds), desc="turns", unit="round", **shown):
            for at in range(len(names)):
                turns[names[(start + at) % len(names)]]()
    return _rows(shape, model, length, variants, floor, on)


def _alone(model: Any, token: Tensor) -> float:
    with torch.no_grad():
        begin = time.perf_counter()
        model(token, use_cache=False).logits.argmax(-1)
        return (time.perf_counter() - begin) * 1e6


def _rows(
    shape: Shape, model: Any, length: int, variants: dict[str, Variant], floor: list[float], on: str | None
) -> list[Row]:
    """Prefill: bytes that the cache holds after it. Decode: the weights and the cache, which a step must read."""
    weights = [weight for name, weight in model.named_parameters() if "embed_tokens" not in name]
    weight_bytes, products = sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
    rows, heads = [], "" if shape.num_kv_heads == Shape().num_kv_heads else f", {shape.num_kv_heads} kv heads"
    layers, full = range(shape.num_layers), Plan.full(shape.num_layers, shape.num_kv_heads)
    of_row = (
        4 * shape.hidden_size // shape.num_kv_heads
    )  # operations per row of a kv head, all query heads of its group
    for name, variant in variants.items():
        plan = variant.plan or full
        prompt = sum(rows_read_by_prompt(plan, length, layer) for layer in layers) * of_row
        step = sum(rows_read(plan, length, layer) for layer in layers) * of_row
        held, time_us = variant.held_bytes, Timing(variant.prefill_us, 0.0)
        flops = 2 * products * length + prompt
        common = {"row_format": variant.kv_dtype, "on": on}
        rows.append(make_row("generate", f"prefill {length}{heads}", name, time_us, nbytes=held, flops=flops, **common))
        sizes = {"nbytes": weight_bytes + held, "flops": 2 * products + step}
        rows.append(make_row("generate", f"decode {length}{heads}", name, timing(variant.step_us), **sizes, **common))
    sizes = {"nbytes": weight_bytes, "flops": 2 * products}
    return [*rows, make_row("generate", f"decode {length}{heads}", "model", timing(floor), **sizes, on=on)]


def summary(rows: list[Row]) -> str:
    """How the razor cache compares with DynamicCache."""
    by_name = {(row.case.split()[0], row.plan): row for row in rows}
    lines = []
    for phase in ("prefill", "decode"):
        dynamic, razor = by_name[phase, "dynamic"], by_name[phase, "razor"]
        target = f" (target {TARGET})" if phase == "decode" else ""
        lines.append(f"{phase}: {dynamic.median_us / razor.median_us:.2f}x as fast as DynamicCache{target}")
    held = by_name["prefill", "razor"].bytes / by_name["prefill", "dynamic"].bytes
    return "\n".join([*lines, f"cache: {held:.2f}x of DynamicCache's"])


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--length", type=int, default=32768, help="tokens of the prompt (default: 32768)")
    flags.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens of it in one call (default: {CHUNK})")
    text = "kv heads of the model, which has 16 query heads (default: 4)"
    flags.add_argument("--kv-heads", type=int, default=Shape().num_kv_heads, help=text)
    text = "razor caches beside the bf16 one, by format of their rows (default: none)"
    flags.add_argument("--kv", choices=QUANTISED, nargs="+", default=[], help=text)
    arguments = flags.parse_args(argv)
    if arguments.kv_heads < 1 or Shape().num_heads % arguments.kv_heads:
        flags.error(f"--kv-heads: expected a divisor of {Shape().num_heads}, got {arguments.kv_heads}")
    options = {
        "shape": Shape(num_kv_heads=arguments.kv_heads),
        "rounds": arguments.rounds,
        "chunk": arguments.chunk,
        "kv_dtypes": arguments.kv,
        "on": arguments.machine,
    }

    def bench() -> list[Row]:
        rows = generate(arguments.length, **options)
        print(summary(rows))
        return rows

    report(measured(bench, arguments.threads), arguments.results)


if __name__ == "__main__":
    main()
