# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, gradients, and what mistakes are told at every door."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import FULL, Call, Case, before_last_call, same_bits, steps
from razor_attention import _core, ops

OPS = ["attention", "append", "head_scores", "alibi_windows"]
POLICY = ((0, FULL, False), (4, 6, True))
CACHE = (
    "key_pages",
    "value_pages",
    "page_table",
    "seen",
    "sink_size",
    "window_size",
    "compensate",
    "key_sum",
    "value_sum",
)
WRITTEN = {"key_pages", "value_pages", "seen", "key_sum", "value_sum", "exact"}
UNQUANTISED: dict[str, Any] = {"exact": None, "exact_sink": 0}


def arguments(op: str, dtype: str = "float32", dense: bool = False) -> dict[str, Any]:
    """Good ones: batch 2, 2 kv heads, 4 heads, 3 new tokens after 20, head_dim 8, page_size 16."""
    if op == "alibi_windows":
        numbers = {"theta": 1e-5, "alpha": 100.0, "method": "msmodelslim"}
        heads = {"slopes": torch.tensor([0.5, 0.25]), "bound": torch.tensor([0.0, 1.5])}
        return {"query": torch.randn(5, 2, 8), "key": torch.randn(7, 2, 8), **heads, **numbers}
    if op == "head_scores":
        return {"query": torch.randn(2, 4, 7, 8), "key": torch.randn(2, 2, 7, 8), "period": 3, "scale": 0.3}
    calls = (Call(20), Call(3, (0, 2), dense))
    case = Case("", POLICY, calls, batch=2, group=2, head_dim=8, page_size=16, dtype=dtype, alibi=True)
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    new = {"query": last.query, "key": last.key, "value": last.value, **dict(zip(CACHE, cache, strict=True))}
    if op == "append":
        return {name: value for name, value in new.items() if name != "query"} | {"pad": last.pad} | UNQUANTISED
    return new | {"alibi_slopes": case.slopes, "pad": last.pad, "scale": 0.3, "dense": dense} | UNQUANTISED


def mapped(args: dict[str, Any], change: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in args.items()}


def positional(op: str, args: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The reference and the fakes take the cache's tensors by position."""
    keywords = {"alibi_slopes", "pad", "scale", "dense", "exact", "exact_sink", "theta", "alpha", "method"} & set(args)
    return [value for name, value in args.items() if name not in keywords], {name: args[name] for name in keywords}


# Schemas, fakes, compilation, gradients.


@pytest.mark.parametrize("op", OPS)
def test_schema(op: str) -> None:
    schema = getattr(torch.ops.razor, op).default._schema
    wrapper = inspect.signature(getattr(ops, op)).parameters
    assert [a.name for a in schema.arguments] == list(wrapper) == list(arguments(op))
    assert [a.name for a in schema.arguments if a.kwarg_only] == [
        p.name for p in wrapper.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == (WRITTEN if op == "append" else set())
    assert schema.is_mutable == (op == "append")
    by_numpy = re.findall(r"(\w+): ", (getattr(_core, op).__doc__ or "").splitlines()[0])
    assert by_numpy == list(wrapper)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU", "PrivateUse1", "Meta"])
def test_every_device_has_an_implementation(op: str, device: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"razor::{op}", device)


@pytest.mark.parametrize(
    ("op", "options"),
    [(op, kind) for op in OPS for kind in ("", "bare")]
    + [("attention", kind) for kind in ("float16", "bfloat16", "dense")],
)
def test_opcheck(op: str, options: str) -> None:
    dtype = options if options in ("float16", "bfloat16") else "float32"
    args = arguments(op, dtype, dense=options == "dense")
    if options == "bare":
        left_out = {"pad", "alibi_slopes", "bound"} & set(args)
        args = mapped(args, torch.nan_to_num) | dict.fromkeys(left_out)
    inputs, keywords = positional(op, args)
    torch.library.opcheck(getattr(torch.ops.razor, op).default, tuple(inputs), keywords)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(backend: str) -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor) -> Tensor:
        out = ops.attention(query * 2, key, value, *cache)
        ops.append(key, value, *cache)
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    case = Case("", POLICY, steps(20, 5, 1, 1), group=2, head_dim=8, page_size=16)
    for n in (2, 3, 4):
        mine, _ = before_last_call(Case("", POLICY, case.calls[:n], group=2, head_dim=8, page_size=16))
        theirs = [t.clone() for t in mine]
        t = case.tokens[n - 1]
        assert torch.equal(compiled(t.query, t.key, t.value, *mine), layer(t.query, t.key, t.value, *theirs))
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
        assert int(mine[3]) == sum(c.q_len for c in case.calls[:n])


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_gradients_are_refused(name: str) -> None:
    args = arguments("attention")
    args[name] = args[name].clone().requires_grad_()
    refusal = (
        "razor::attention: expected inputs that need no gradient, got one that does; call it under torch.no_grad()"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(refusal)}$"):
        ops.attention(**args)
    with torch.no_grad():
        assert not ops.attention(**args).requires_grad


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in ("query", "key")][:-1])
def test_gradients_are_refused_by_the_dispatcher(op: str, name: str) -> None:
    """Direct calls would lose them without a word: the output would say requires_grad, and backward do nothing."""
    args = arguments(op)
    name = name if name in args else "value"
    args[name] = args[name].clone().requires_grad_()
    inputs, keywords = positional(op, args)
    call = getattr(torch.ops.razor, op)
    refusal = f"razor::{op}: expected inputs that need no gradient, got one that does; call it under torch.no_grad()"
    for run in (call, getattr(ops, op)):
        with pytest.raises(NotImplementedError, match=f"^{re.escape(refusal)}$"):
            run(*inputs, **keywords)
    with torch.no_grad():
        call(*inputs, **keywords)
    with torch.inference_mode():
        call(*inputs, **keywords)


@pytest.mark.parametrize("call", [ops.head_scores, torch.ops.razor.head_scores], ids=["wrapper", "op"])
def test_gradients_are_refused_in_compiled_code(call: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: call(q * 2, k, 3, scale=1.0)[0] + 1, backend="aot_eager")
    query, key = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    with pytest.raises(Exception, match="expected inputs that need no gradient, got one that does"):
        compiled(query.requires_grad_(), key)
    query.requires_grad_(False)
    assert torch.equal(compiled(query, key), call(query * 2, key, 3, scale=1.0)[0] + 1)


def test_scale_is_one_over_the_root_of_head_dim() -> None:
    args = arguments("attention") | {"scale": 8**-0.5}
    assert torch.equal(ops.attention(**args), ops.attention(**args | {"scale": None}))
    args = arguments("head_scores") | {"scale": 8**-0.5}
    assert torch.equal(ops.head_scores(**args)[0], ops.head_scores(**args | {"scale": None})[0])


# Mistakes. Shapes and dtypes are checked at every door, in the same words.

ROWS = "expected dtype float32, bfloat16 or float16, got"
TOKENS_MISTAKES = [
    ("key", lambda t: t[0], "key: expected 4 dimensions (batch, num_kv_heads, q_len, head_dim), got shape [2, 3, 8]"),
    ("value", lambda t: t.half(), "value: expected dtype float32 like key, got float16"),
    ("value", lambda t: t.double(), "value: expected dtype float32 like key, got another dtype"),
    ("value", lambda t: t[:, :, :2], "value: expected shape [2, 2, 3, 8], got [2, 2, 2, 8]"),
    ("value", lambda t: t[0], "value: expected shape [2, 2, 3, 8], got [2, 3, 8]"),
    ("pad", lambda t: t.int(), "pad: expected dtype int64, got int32"),
    ("pad", lambda t: t[:1], "pad: expected shape [2], got [1]"),
    (
        "key_pages",
        lambda t: t[0],
        "key_pages: expected 3 dimensions (num_pages, page_size, head_dim), got shape [16, 8]",
    ),
    ("key_pages", lambda t: t.half(), "key_pages: expected dtype float32 like key, int8 or uint8, got float16"),
    ("key_pages", lambda t: t[:, :, :6], "key_pages: expected shape [any, any, 8], got [9, 16, 6]"),
    ("key_pages", lambda t: t[:, :12].clone(), "key_pages: expected a page_size that is a multiple of 16, got 12"),
    ("key_pages", lambda t: t[:, :0].clone(), "key_pages: expected a page_size that is a multiple of 16, got 0"),
    ("value_pages", lambda t: t.half(), "value_pages: expected dtype float32 like key_pages, got float16"),
    ("value_pages", lambda t: t[1:], "value_pages: expected shape [9, 16, 8], got [8, 16, 8]"),
    ("page_table", lambda t: t.long(), "page_table: expected dtype int32, got int64"),
    ("page_table", lambda t: t[1:], "page_table: expected shape [4, any], got [3, 3]"),
    ("page_table", lambda t: t[0], "page_table: expected shape [4, any], got [3]"),
    ("seen", lambda t: t.int(), "seen: expected dtype int64, got int32"),
    ("seen", lambda t: t[:1], "seen: expected shape [2], got [1]"),
    ("sink_size", lambda t: t.long(), "sink_size: expected dtype int32, got int64"),
    ("sink_size", lambda t: t[:1], "sink_size: expected shape [2], got [1]"),
    ("window_size", lambda t: t.float(), "window_size: expected dtype int32, got float32"),
    ("window_size", lambda t: t[:1], "window_size: expected shape [2], got [1]"),
    ("compensate", lambda t: t.int(), "compensate: expected dtype bool, got int32"),
    ("compensate", lambda t: t.repeat(2), "compensate: expected shape [2], got [4]"),
    ("key_sum", lambda t: t.half(), "key_sum: expected dtype float32, got float16"),
    ("key_sum", lambda t: t[:, :4], "key_sum: expected shape [4, 8], got [4, 4]"),
    ("value_sum", lambda t: t.double(), "value_sum: expected dtype float32, got another dtype"),
    ("value_sum", lambda t: t[1:], "value_sum: expected shape [4, 8], got [3, 8]"),
]  # fmt: skip
MISTAKES = [
    *(("append", *mistake) for mistake in TOKENS_MISTAKES),
    *(("attention", *mistake) for mistake in TOKENS_MISTAKES),
    ("append", "key", lambda t: t.double(), f"key: {ROWS} another dtype"),
    ("append", "key", lambda t: t.long(), f"key: {ROWS} int64"),
    ("append", "key", lambda t: t[:, :0], "key: expected at least one kv head and one element, got shape [2, 0, 3, 8]"),
    ("append", "key", lambda t: t[..., :0],
     "key: expected at least one kv head and one element, got shape [2, 2, 3, 0]"),
    ("attention", "query", lambda t: t[0],
     "query: expected 4 dimensions (batch, num_heads, q_len, head_dim), got shape [4, 3, 8]"),
    ("attention", "query", lambda t: t.half(), "query: expected dtype float32 like key, got float16"),
    ("attention", "query", lambda t: t[..., :4], "query: expected shape [2, any, 3, 8], got [2, 4, 3, 4]"),
    ("attention", "query", lambda t: t[:, :3], "query: expected a multiple of the 2 kv heads as num_heads, got 3"),
    ("attention", "query", lambda t: t[:, :0], "query: expected a multiple of the 2 kv heads as num_heads, got 0"),
    ("attention", "alibi_slopes", lambda t: t.double(), "alibi_slopes: expected dtype float32, got another dtype"),
    ("attention", "alibi_slopes", lambda t: t[:2], "alibi_slopes: expected shape [4], got [2]"),
    ("head_scores", "query", lambda t: t[0],
     "query: expected 4 dimensions (batch, num_heads, tokens, head_dim), got shape [4, 7, 8]"),
    ("head_scores", "key", lambda t: t[0],
     "key: expected 4 dimensions (batch, num_kv_heads, tokens, head_dim), got shape [2, 7, 8]"),
    ("head_scores", "key", lambda t: t.half(), "key: expected dtype float32 like query, got float16"),
    ("head_scores", "key", lambda t: t[:, :, 1:], "key: expected shape [2, any, 7, 8], got [2, 2, 6, 8]"),
    ("head_scores", "query", lambda t: t[:, :3], "query: expected a multiple of the 2 kv heads as num_heads, got 3"),
    ("head_scores", "query", lambda t: t[:, :0], "query: expected a multiple of the 2 kv heads as num_heads, got 0"),
    ("head_scores", "key", lambda t: t[:, :0], "query: expected a multiple of the 0 kv heads as num_heads, got 4"),
    ("head_scores", "*", lambda t: t.double(), f"query: {ROWS} another dtype"),
    ("head_scores", "period", lambda _: 0, "period: expected a value >= 1, got 0"),
    ("head_scores", "period", lambda _: -3, "period: expected a value >= 1, got -3"),
    *(("head_scores", "period", lambda _, period=period: period,
       f"query: expected 1 + period * repeats tokens with period {period} and at least 2 repeats, got 7")
      for period in (4, 6, 7, 100)),
    ("head_scores", "*", lambda t: t[:, :, :0],
     "query: expected 1 + period * repeats tokens with period 3 and at least 2 repeats, got 0"),
    ("alibi_windows", "query", lambda t: t[0],
     "query: expected 3 dimensions (q_rows, num_heads, cols), got shape [2, 8]"),
    ("alibi_windows", "key", lambda t: t[None],
     "key: expected 3 dimensions (k_rows, num_heads, cols), got shape [1, 7, 2, 8]"),
    ("alibi_windows", "*", lambda t: t.double(), f"query: {ROWS} another dtype"),
    ("alibi_windows", "key", lambda t: t.half(), "key: expected dtype float32 like query, got float16"),
    ("alibi_windows", "key", lambda t: t[:, :1], "key: expected shape [any, 2, 8], got [7, 1, 8]"),
    ("alibi_windows", "key", lambda t: t[..., :6], "key: expected shape [any, 2, 8], got [7, 2, 6]"),
    ("alibi_windows", "query", lambda t: t[:0],
     "query: expected at least one row, head and column, got shape [0, 2, 8]"),
    ("alibi_windows", "query", lambda t: t[:, :0],
     "query: expected at least one row, head and column, got shape [5, 0, 8]"),
    ("alibi_windows", "query", lambda t: t[..., :0],
     "query: expected at least one row, head and column, got shape [5, 2, 0]"),
    ("alibi_windows", "key", lambda t: t[:0], "key: expected at least one row, head and column, got shape [0, 2, 8]"),
    ("alibi_windows", "slopes", lambda t: t.double(), "slopes: expected dtype float32, got another dtype"),
    ("alibi_windows", "slopes", lambda t: t[:1], "slopes: expected shape [2], got [1]"),
    ("alibi_windows", "slopes", lambda t: t[None], "slopes: expected shape [2], got [1, 2]"),
    ("alibi_windows", "bound", lambda t: t.half(), "bound: expected dtype float32, got float16"),
    ("alibi_windows", "bound", lambda t: t.repeat(2), "bound: expected shape [2], got [4]"),
    *(("alibi_windows", "theta", lambda _, theta=theta: theta, f"theta: expected a value > 0 and <= 1, got {text}")
      for theta, text in ((0.0, "0"), (-1e-5, "-1e-05"), (1.5, "1.5"), (math.nan, "nan"), (-math.nan, "nan"))),
    *(("alibi_windows", "alpha", lambda _, alpha=alpha: alpha, f"alpha: expected a finite value >= 0, got {text}")
      for alpha, text in ((-1.0, "-1"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"))),
    ("alibi_windows", "method", lambda _: "theorem", "method: expected msmodelslim or per_head, got theorem"),
    ("alibi_windows", "method", lambda _: "", "method: expected msmodelslim or per_head, got "),
]  # fmt: skip


def spoiled(op: str, name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    args = arguments(op)
    return mapped(args, change) if name == "*" else args | {name: change(args[name])}


def at_door(door: str, op: str, args: dict[str, Any]) -> Any:
    if door == "torch":
        return getattr(torch.ops.razor, op)(**args)
    if door == "numpy":
        return getattr(_core, op)(**mapped(args, Tensor.numpy))
    if door == "meta":
        return getattr(torch.ops.razor, op)(**mapped(args, lambda t: t.to("meta")))
    inputs, keywords = positional(op, args)
    return getattr(ops, f"_{op}_reference")(*inputs, **keywords)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("door", ["torch", "numpy", "meta", "reference"])
def test_good_arguments_pass(door: str, op: str) -> None:
    at_door(door, op, arguments(op))


@pytest.mark.parametrize("door", ["torch", "numpy", "meta", "reference"])
@pytest.mark.parametrize(("op", "name", "change", "message"), MISTAKES, ids=[f"{m[0]}-{m[3]}" for m in MISTAKES])
def test_mistake(door: str, op: str, name: str, change: Callable[[Any], Any], message: str) -> None:
    args = spoiled(op, name, change)
    before = mapped(args, Tensor.clone)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}\\Z"):
        at_door(door, op, args)
    for argument, value in before.items():
        assert not isinstance(value, Tensor) or same_bits(value, args[argument])


# What only native kernels mind: strides, and the values that steer memory accesses.

STRIDED = [
    ("append", "key", "a contiguous last dimension, got stride 2", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    ("append", "value", "a contiguous last dimension, got stride 2", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    ("attention", "query", "a contiguous last dimension, got stride 2", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    ("head_scores", "query", "a contiguous last dimension, got stride 7", lambda t: t.mT.contiguous().mT),
    ("head_scores", "key", "a contiguous last dimension, got stride 7", lambda t: t.mT.contiguous().mT),
    ("append", "pad", "a contiguous array, got stride 2 in dimension 0", lambda t: t.repeat_interleave(2)[::2]),
    ("append", "key_pages", "a contiguous array, got stride 16 in dimension 1", lambda t: t.repeat(1, 1, 2)[..., :8]),
    ("append", "value_pages", "a contiguous array, got stride 16 in dimension 2", lambda t: t.mT.contiguous().mT),
    ("append", "page_table", "a contiguous array, got stride 4 in dimension 1", lambda t: t.T.contiguous().T),
    ("append", "seen", "a contiguous array, got stride 2 in dimension 0", lambda t: t.repeat_interleave(2)[::2]),
    ("append", "window_size", "a contiguous array, got stride 0 in dimension 0", lambda t: t[:1].expand(2)),
    ("append", "value_sum", "a contiguous array, got stride 4 in dimension 1", lambda t: t.T.contiguous().T),
    ("attention", "alibi_slopes", "a contiguous array, got stride 2 in dimension 0", lambda t: t.repeat(2)[::2]),
    ("alibi_windows", "slopes", "a contiguous array, got stride 2 in dimension 0", lambda t: t.repeat(2)[::2]),
    ("alibi_windows", "bound", "a contiguous array, got stride 0 in dimension 0", lambda t: t[:1].expand(2)),
]
VALUES = [
    ("sink_size", [0, -4], "sink_size: expected values >= 0, got -4 for kv head 1"),
    ("window_size", [-1, 6], "window_size: expected values >= 0, got -1 for kv head 0"),
    ("seen", [20, -1], "seen: expected values from 0 to 281474976710656, got -1 for sequence 1"),
    ("pad", [0, 4], "pad: expected values from 0 to 3, got 4 for sequence 1"),
    ("pad", [-1, 0], "pad: expected values from 0 to 3, got -1 for sequence 0"),
    ("seen", [20, 60], "page_table: expected at least 4 pages for sequence 1, kv head 0, got 3"),
    ("page_table", [[0, 1, -1], [0, 0, 0], [0, 11, 0], [0, 0, 0]],
     "page_table: expected page ids from 0 to 8, got 11 for sequence 1, kv head 0"),
    ("page_table", [[0, 1, -1], [-1, 0, 0], [0, 1, 0], [0, 0, 0]],
     "page_table: expected page ids from 0 to 8, got -1 for sequence 0, kv head 1"),
]  # fmt: skip


@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize(("op", "name", "message", "change"), STRIDED, ids=[f"{m[0]}-{m[1]}" for m in STRIDED])
def test_stride_that_kernels_do_not_take(
    door: str, op: str, name: str, message: str, change: Callable[[Tensor], Tensor]
) -> None:
    args = spoiled(op, name, change)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: expected {message}')}\\Z"):
        at_door(door, op, args)


@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("op", ["attention", "append"])
@pytest.mark.parametrize(("name", "values", "message"), VALUES, ids=[m[2] for m in VALUES])
def test_value_that_kernels_do_not_take(door: str, op: str, name: str, values: list[Any], message: str) -> None:
    args = spoiled(op, name, lambda t: torch.tensor(values, dtype=t.dtype))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}\\Z"):
        at_door(door, op, args)


WEIGHTS = [  # not known without the values: the fake passes them
    ("slopes", [0.5, 0.0], "slopes: expected values > 0, got 0 for head 1"),
    ("slopes", [-0.25, 0.5], "slopes: expected values > 0, got -0.25 for head 0"),
    ("slopes", [math.nan, 0.5], "slopes: expected values > 0, got nan for head 0"),
    ("slopes", [-math.nan, 0.5], "slopes: expected values > 0, got nan for head 0"),
    ("slopes", [0.5, math.inf], "slopes: expected finite values, got inf for head 1"),
    ("slopes", [0.5, 1e-30], "slopes: expected windows within int64, got 8.99871e+31 for head 1"),
    ("bound", [1.0, -1.0], "bound: expected finite values >= 0, got -1 for head 1"),
    ("bound", [math.inf, 0.0], "bound: expected finite values >= 0, got inf for head 0"),
    ("bound", [math.nan, 0.0], "bound: expected finite values >= 0, got nan for head 0"),
    ("query", [[[1.0, 0.0], [math.inf, 1.0]]], "query: expected finite products with key, got inf in head 1"),
]


@pytest.mark.parametrize("door", ["torch", "numpy", "reference"])
@pytest.mark.parametrize(("name", "values", "message"), WEIGHTS, ids=[m[2] for m in WEIGHTS])
def test_value_that_gives_no_window(door: str, name: str, values: list[Any], message: str) -> None:
    args = arguments("alibi_windows") | {"query": torch.ones(1, 2, 2), "key": torch.ones(1, 2, 2)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}\\Z"):
        at_door(door, "alibi_windows", args | {name: torch.tensor(values)})


@pytest.mark.parametrize("door", ["torch", "numpy", "reference"])
@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_per_head_ignores_no_product(door: str, value: float, text: str) -> None:
    args = arguments("alibi_windows") | {"query": torch.ones(1, 2, 2), "key": torch.ones(1, 2, 2), "method": "per_head"}
    args["query"][0, 1, 0] = value
    with pytest.raises(ValueError, match=f"^query: expected finite products with key, got {text} in head 1$"):
        at_door(door, "alibi_windows", args)


def test_the_error_that_append_documents() -> None:
    cache, case = before_last_call(Case("", ((0, 3, False), (0, FULL, False)), steps(30, 3), page_size=16, head_dim=8))
    narrow = (*cache[:2], cache[2][:, :2].contiguous(), *cache[3:])
    message = "page_table: expected at least 3 pages for sequence 0, kv head 1, got 2"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.append(case.tokens[-1].key, case.tokens[-1].value, *narrow)
    assert message in (ops.append.__doc__ or "")


def test_numpy_arrays_have_mistakes_of_their_own() -> None:
    args = mapped(arguments("append"), Tensor.numpy)
    bytes_between = np.zeros((2, 2, 3, 8), dtype=[("f", "f4"), ("b", "i1")])["f"]
    for changed, message in (
        ({"key": args["key"][None]}, "key: expected at most 4 dimensions, got 5"),
        ({"value": bytes_between}, "value: expected strides in whole elements, got 5 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}\\Z"):
            _core.append(**args | changed)


def test_numpy_module_takes_no_query_token() -> None:
    args = mapped(arguments("attention") | {"pad": torch.zeros(2, dtype=torch.int64)}, Tensor.numpy)
    args |= {name: args[name][:, :, :0] for name in ("query", "key", "value")}
    assert _core.attention(**args).shape == (2, 4, 0, 8)
    _core.append(**{name: args[name] for name in arguments("append")})
    assert args["seen"].tolist() == [20, 20]


@pytest.mark.parametrize("name", sorted(WRITTEN - {"exact"}))
def test_numpy_module_writes_to_no_read_only_array(name: str) -> None:
    args = arguments("append")
    arrays = mapped(args, Tensor.numpy)
    arrays[name].flags.writeable = False
    before = mapped(args, Tensor.clone)
    with pytest.raises(ValueError, match=f"^{name}: expected a writable array, got a read-only one$"):
        _core.append(**arrays)
    assert all(same_bits(args[n], t) for n, t in before.items() if isinstance(t, Tensor))
    _core.attention(**mapped(arguments("attention"), Tensor.numpy) | {name: arrays[name]})  # only reads
