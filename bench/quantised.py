# SPDX-License-Identifier: Apache-2.0
"""What do quantised rows cost? Attention's output over them against the output over the rows as they came.

Rows are made by the package's own formats and by others, here only, that could take their place; bytes stand beside the
errors. They come from the shipped models, which read texts and questions of their language, and are drawn with the
oddities of larger models' keys. What exact first or newest tokens would bring is measured with the same rows.

Every query is answered as in decode, in float64: its own token as it is, all earlier ones as they were stored. Its
error is |output - exact| / |exact|; errors are means over queries and heads.

Example: python -m razor_attention.bench.quantised --length 4096
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from razor_attention import LayerCache, Plan, RazorCache, attach
from razor_attention.hf.models import geometry, load_model
from razor_attention.hf.names import CACHE
from razor_attention.reference import decode_rows, encode_rows, row_width
from razor_attention.rotation import rotated_key, rotated_query

from .alibi_demo import MODEL as ALIBI_MODEL
from .demo import MODEL
from .harness import machine, parser, table, use_threads
from .questions import make_questions, make_text

QUERIES = 64  # last tokens, whose outputs are compared
FIRST = 64  # tokens that keys are centred or smoothed by
SEED = 3
HEADS, HEAD_DIM = 8, 128  # of drawn rows


class Result(NamedTuple):
    """One row of quantised.csv."""

    rows: str  # where they come from
    layer: str
    head_dim: int
    form: str
    exact: str  # tokens left as they are, beside the query's own
    key_bytes: float  # of a row
    value_bytes: float
    key_error: float  # keys alone quantised
    value_error: float
    error: float  # both
    worst_head: float  # of these


# --- codes of rows


class Code(NamedTuple):
    """A way to store rows: (heads, tokens, head_dim), float32, to what is read back; bytes of a row by head_dim."""

    read_back: Callable[[Tensor], Tensor]
    nbytes: Callable[[int], float]


def package(dtype: torch.dtype) -> Code:
    """The package's own: int8, or uint8 for int4."""

    def read_back(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return decode_rows(*encode_rows(rows, dtype), x.shape[2], dtype).view(x.shape)

    return Code(read_back, lambda dim: row_width(dim, dtype))


def halves(group: int) -> Code:
    """4 bits; the least element and the step of a group in float16."""

    def read_back(x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, min(group, x.shape[-1])))
        least = y.amin(-1, keepdim=True).half().float()
        step = ((y.amax(-1, keepdim=True) - least) / 15).half().float().clamp(min=2.0**-24)
        return (least + ((y - least) / step).round().clamp(0, 15) * step).flatten(-2).double()

    return Code(read_back, lambda dim: dim / 2 + 4 * math.ceil(dim / group))


def words(group: int) -> Code:
    """4 bits; one 16-bit word a group: a step of 4 significant bits, and which code is 0."""

    def up(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 16).ceil() / 16, exponent)

    def read_back(x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, min(group, x.shape[-1])))
        low, high = y.amin(-1, keepdim=True).clamp(max=0), y.amax(-1, keepdim=True).clamp(min=0)
        step = up((high / 16 - low / 16).clamp(min=2.0**-126))
        zero = (-low / step - 0.5).ceil().clamp(0, 15)
        step = torch.where(zero > 15.5 - high / step, up(step * 1.001), step)  # the 16 codes must reach both ends
        zero = (-low / step - 0.5).ceil().clamp(0, 15)
        code = ((y / step).round() + zero).clamp(0, 15)
        return ((code - zero) * step).flatten(-2).double()

    return Code(read_back, lambda dim: dim / 2 + 2 * math.ceil(dim / group))


def by_channel(tokens: int) -> Code:
    """4 bits; least element and step of each channel over some tokens, in float16."""

    def read_back(x: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(x.mT, (0, -x.shape[1] % tokens), mode="replicate")
        return halves(tokens).read_back(whole).mT[:, : x.shape[1]]

    return Code(read_back, lambda dim: dim / 2 + 4 * dim / tokens)


# --- what is done to rows before, so that q.k stays as it was


def as_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the same rotation, rounded once."""
    return as_bf16(rotated_query(q)), as_bf16(rotated_key(k))


def centred(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys less the mean of the first ones: all logits of a query move alike."""
    return q, as_bf16(k - as_bf16(k[:, :FIRST].mean(1, keepdim=True)))


def centred_and_rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(*centred(q, k))


def smoothed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of keys over what the first ones measure, queries times it."""
    size = k[:, :FIRST].square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    return as_bf16(q * size), as_bf16(k / size)


class Form(NamedTuple):
    """How keys and values are stored."""

    key: Code
    value: Code
    before: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = plain
    turn_values: bool = False  # rotated too, and the output back


INT8, INT4, BF16 = package(torch.int8), package(torch.uint8), Code(as_bf16, lambda dim: 2 * dim)
FORMS = {
    "bf16": Form(BF16, BF16),
    "bf16, rotated keys": Form(BF16, BF16, rotated),
    "int8": Form(INT8, INT8),
    "int8, rotated keys": Form(INT8, INT8, rotated),
    "int8, centred keys": Form(INT8, INT8, centred),
    "int8 keys, int4 values": Form(INT8, INT4),
    "int8 rotated keys, int4 values": Form(INT8, INT4, rotated),
    "int4": Form(INT4, INT4),
    "int4, rotated keys": Form(INT4, INT4, rotated),
    "int4, rotated keys and values": Form(INT4, INT4, rotated, turn_values=True),
    "int4, centred keys": Form(INT4, INT4, centred),
    "int4, centred and rotated keys": Form(INT4, INT4, centred_and_rotated),
    "int4, smoothed keys": Form(INT4, INT4, smoothed),
    "float16 pairs of 32": Form(halves(32), halves(32)),
    "float16 pairs of 64": Form(halves(64), halves(64)),
    "words of 8": Form(words(8), words(8)),
    "words of 32": Form(words(32), words(32)),
    "words of 32, rotated keys": Form(words(32), words(32), rotated),
    "one word, rotated keys": Form(words(1024), words(1024), rotated, turn_values=True),
    "keys by channel of 64 tokens": Form(by_channel(64), INT4),
    "keys by channel of 64, centred": Form(by_channel(64), INT4, centred),
}
EXACT = {  # first tokens, newest tokens (the query's own is one of them)
    "first 4": (4, 1),
    "newest 64": (0, 64),
    "newest 128": (0, 128),
    "first 4, newest 64": (4, 64),
}
EXACT_FORMS = ("int8", "int4", "int4, rotated keys")


# --- rows


class Rows(NamedTuple):
    """Heads' keys and values, and the queries of the last tokens."""

    query: Tensor  # (heads, queries, head_dim)
    key: Tensor  # (heads, tokens, head_dim), one for each query head
    value: Tensor
    scale: float
    slopes: Tensor | None = None  # (heads,): ALiBi


def captured(folder: Path, length: int) -> Iterator[tuple[str, str, Rows]]:
    """What every layer of a shipped model attends with, in a text and in a prompt with a question at its end."""
    model, tokenizer = load_model(folder, "float32")
    sizes = geometry(model.config)
    plan = Plan.full(sizes.num_layers, sizes.num_kv_heads)
    prompts = {
        "text": make_text(tokenizer, length, SEED),
        "question": make_questions(tokenizer, length=length, count=1, seed=SEED)[0].ids,
    }
    for name, ids in prompts.items():
        seen = list[Rows]()
        attend = LayerCache.attend

        def watch(
            self: LayerCache, q: Tensor, k: Tensor, v: Tensor, seen: Any = seen, attend: Any = attend, **more: Any
        ) -> Tensor:
            k8, v8 = (one[0].repeat_interleave(q.shape[1] // k.shape[1], 0) for one in (k, v))
            scale = more["scale"] or q.shape[3] ** -0.5
            seen.append(Rows(*map(as_bf16, (q[0, :, -QUERIES:], k8, v8)), scale, self.alibi_slopes))
            out: Tensor = attend(self, q, k, v, **more)
            return out

        with torch.no_grad(), attach(model, plan), mock.patch.object(LayerCache, "attend", watch):
            model(torch.tensor([ids]), **{CACHE: RazorCache(model.config, plan)})
        for layer, rows in enumerate(seen):
            yield f"{folder.name}, {name}", str(layer), rows


def drawn(length: int) -> Iterator[tuple[str, str, Rows]]:
    """Keys with what larger models' keys have: heavy tails, channels far from 0, channels of other sizes, a sink."""
    rng = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def heavy() -> Tensor:  # Student's t of 3 degrees of freedom
        return normal(HEADS, length, HEAD_DIM) / (normal(3, HEADS, length, HEAD_DIM).square().mean(0)).sqrt()

    q, k, v = 2 * normal(HEADS, QUERIES, HEAD_DIM), normal(HEADS, length, HEAD_DIM), normal(HEADS, length, HEAD_DIM)
    size = normal(HEAD_DIM).exp()
    offset = torch.zeros(HEAD_DIM, dtype=torch.float64)
    offset[[5, 37, 69, 101]] = torch.tensor([15.0, -12.0, 10.0, -8.0], dtype=torch.float64)
    bias = torch.zeros(HEAD_DIM, dtype=torch.float64)
    bias[[10, 44, 60, 118]] = torch.tensor([20.0, -30.0, 40.0, -25.0], dtype=torch.float64)
    at = torch.arange(length, dtype=torch.float64)
    to_sink = torch.zeros(HEAD_DIM, dtype=torch.float64)
    to_sink[[3, 40, 77, 90]] = 5.5
    sink_k, sink_v = k.clone(), v.clone()
    sink_k[:, 0], sink_v[:, 0] = sink_k[:, 0] + to_sink, sink_v[:, 0] * 0.05
    cases: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {
        "normal": (q, k, v, None),
        "heavy tails": (q, heavy(), heavy(), None),
        "4 channels far from 0": (q, k * (1 + offset.ne(0)) + offset, v, None),
        "key bias before RoPE": (rope(q, at[-QUERIES:]), rope(k + bias, at), v, None),
        "lognormal channels": (q / size.sqrt(), k * size, v, None),
        "a sink": (q + to_sink, sink_k, sink_v, None),
        "near tokens": (q, k, v, torch.full((HEADS,), 1 / 32, dtype=torch.float64)),
    }
    for name, (query, key, value, slopes) in cases.items():
        yield name, "", Rows(*map(as_bf16, (query, key, value)), HEAD_DIM**-0.5, slopes)


def rope(x: Tensor, at: Tensor) -> Tensor:
    """Rows (heads, tokens, head_dim) turned to their positions (tokens,), by the base of Qwen2."""
    half = x.shape[2] // 2
    angle = at[:, None] * 1e6 ** -(torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# --- errors


def measure(name: str, layer: str, rows: Rows) -> Iterator[Result]:
    """All forms over the same rows."""
    dim = rows.key.shape[2]
    wanted = output(rows, rows.query, rows.key, rows.key, rows.value, rows.value)
    for form_name, form in FORMS.items():
        query, key = form.before(rows.query, rows.key)
        value = as_bf16(rotated_key(rows.value)) if form.turn_values else rows.value
        back = rotated_query if form.turn_values else Tensor.clone
        stored_key, stored_value = form.key.read_back(key.float()), form.value.read_back(value.float())
        for exact, kept in {"": (0, 1), **(EXACT if form_name in EXACT_FORMS else {})}.items():
            found = [
                error(back(output(rows, query, key, k, value, v, *kept)), wanted)
                for k, v in ((stored_key, value), (key, stored_value), (stored_key, stored_value))
            ]
            sizes = form.key.nbytes(dim), form.value.nbytes(dim)
            errors = [float(f"{one.mean():.4g}") for one in found]
            yield Result(name, layer, dim, form_name, exact, *sizes, *errors, float(f"{found[2].max():.4g}"))


def output(
    rows: Rows,
    query: Tensor,
    key: Tensor,
    stored_key: Tensor,
    value: Tensor,
    stored_value: Tensor,
    first: int = 0,
    newest: int = 1,
) -> Tensor:
    """(heads, queries, head_dim): every query reads its `newest` and the `first` tokens as they are, others stored."""
    tokens = key.shape[1]
    distance = torch.arange(tokens - query.shape[1], tokens)[:, None] - torch.arange(tokens)
    exact = (distance < newest) | (torch.arange(tokens) < first)
    logit = rows.scale * torch.where(exact, query @ key.mT, query @ stored_key.mT)
    if rows.slopes is not None:
        logit = logit - rows.slopes.double()[:, None, None] * distance
    weight = logit.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return (weight * exact) @ value + (weight * ~exact) @ stored_value


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """(heads,): mean over queries of the relative error."""
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean(-1)


def summary(results: list[Result]) -> str:
    """Errors of both, a line for each form; of models the mean over layers."""
    names = list(dict.fromkeys(result.rows for result in results))
    lines = []
    for form, exact in dict.fromkeys((result.form, result.exact) for result in results):
        same = [result for result in results if (result.form, result.exact) == (form, exact)]
        wide = next((r for r in same if r.head_dim == HEAD_DIM), same[0])
        cells = [[r.error for r in same if r.rows == name] for name in names]
        size = (wide.key_bytes + wide.value_bytes) / 2
        lines.append((f"{form}{exact and ', exact '}{exact}", size, *(sum(cell) / len(cell) for cell in cells)))
    return table(("form", "bytes", *names), lines, left=1)


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    arguments = flags.parse_args(argv)
    use_threads(flags, arguments.threads)
    results = list[Result]()
    for source in (drawn(arguments.length), *(captured(one, arguments.length) for one in (MODEL, ALIBI_MODEL))):
        for name, layer, rows in source:
            results += measure(name, layer, rows)
    print(summary(results))
    target = arguments.results / (arguments.machine or machine()) / "quantised.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *results])
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
