# SPDX-License-Identifier: Apache-2.0
"""A plan in the form of another runtime: ATB's tensors, MindIE-LLM's table, Golden Stick's and DuoAttention's files.

What a form has no place for is refused, never rounded to what it has. Where the form holds the whole plan and the
runtime then computes something else from it, a warning says so; why ours is right is told in COMPATIBILITY.md.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__, atb, files
from .checks import check_int
from .plan import Plan

TARGETS = {  # runtime -> the options that its form takes
    "atb": ("length", "head_dim", "scale", "block_size", "max_new_tokens", "offset", "alibi"),
    "mindie": ("model_type",),
    "golden-stick": ("length",),
    "duo": ("length",),
}
_BUILT_IN = 4000, 0.2  # MindIE's windows: max(4000, prompt // 5)
_FUNCTION = "get_global_wins"


class MindieTable(NamedTuple):
    """Retrieval heads of one model in MindIE-LLM."""

    model_type: str
    num_layers: int
    sink_size: int  # its first_sink
    heads: files.TwoLists


def export_plan(plan: Plan, to: str, out: Path, options: dict[str, Any]) -> str:
    """What `razor export` does: write a plan in one of the forms.

    Args:
        plan: policy.
        to: one of TARGETS.
        out: file to write, for DuoAttention a folder.
        options: values of the flags that were given, those of the form alone.
    Returns:
        What there is to say beside the file.
    Raises:
        ValueError: --scale: expected --to atb with it, got --to duo
    """
    for name in options:
        if name not in TARGETS[to]:
            takers = " or ".join(other for other, taken in TARGETS.items() if name in taken)
            raise ValueError(f"--{name.replace('_', '-')}: expected --to {takers} with it, got --to {to}")
    needed = {"atb": ("length", "head_dim"), "mindie": ("model_type",)}.get(to, ())
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"--{missing[0].replace('_', '-')}: expected a value with --to {to}, got none")
    lengths = options.get("length", [])
    if to == "atb":
        layers = save_atb(plan, out, lengths, **{name: value for name, value in options.items() if name != "length"})
        rows = sum(int(layer["context_lens"].sum()) for layer in layers)
        return f"{len(layers)} layers, {rows} cache rows behind prompts of {', '.join(map(str, lengths))} tokens"
    if to == "mindie":
        save_mindie(plan, out, **options)
        return "put it in the place of get_razor_attention_wins.py"
    if len(lengths) > 1:
        raise ValueError(f"--length: expected one value with --to {to}, got {len(lengths)}")
    final = plan.resolve(lengths[0]) if lengths else plan
    if to == "duo":
        save_duo(final, out)
        return "DuoAttention reads it with load_attn_pattern"
    settings = ", ".join(f"{name}={value}" for name, value in save_golden_stick(final, out).items())
    return f"with it goes RAConfig({settings})"


def save_atb(
    plan: Plan,
    path: files.PathLike,
    lengths: Sequence[int],
    *,
    head_dim: int,
    scale: float | None = None,
    block_size: int = 128,
    max_new_tokens: int = 256,
    offset: str = "atb",
    alibi: bool = False,
) -> list[dict[str, Tensor]]:
    """Write `atb.plan_tensors` with a manifest as one .pt: {"manifest": {...}, "layers": [{name: tensor}, ...]}.

    Args:
        plan: policy.
        path: file to write; `torch.load(path, weights_only=True)` reads it.
        lengths: tokens of each prompt.
        head_dim, scale, block_size, max_new_tokens, offset, alibi: as in `atb.plan_tensors`.
    Returns:
        What was written of each layer.
    Raises:
        ValueError: as `atb.plan_tensors`.
    """
    sizes: dict[str, Any] = {"head_dim": head_dim, "block_size": block_size, "max_new_tokens": max_new_tokens}
    layers = atb.plan_tensors(plan, lengths, scale=scale, offset=offset, alibi=alibi, **sizes)
    manifest = {
        "format": "razor-attention atb",
        "version": 1,
        "compressType": 1 if alibi else 2,
        "qkScale": head_dim**-0.5 if scale is None else scale,
        "kvHeadNum": plan.num_kv_heads,
        "offset": offset,
        "lengths": list(lengths),
        **sizes,
        "host": ["context_lens"],
        "package": __version__,
        "provenance": json.dumps(plan.provenance),
    }
    files.write_atomic(path, lambda file: torch.save({"manifest": manifest, "layers": layers}, file))
    return layers


def save_mindie(plan: Plan, path: files.PathLike, *, model_type: str) -> None:
    """Write a Python module that stands in for MindIE-LLM's get_razor_attention_wins.py.

    Full heads all stand in its first list: which of the two a head is in makes no difference there.

    Args:
        plan: compressed heads with one sink_size, windows of max(4000, 0.2 of the prompt) and compensation: all else
            is built into MindIE. Not resolved.
        path: file to write, ending in .py.
        model_type: of the model's config.json, which MindIE asks for.
    Raises:
        ValueError: plan: expected windows of max(4000, 0.2 of the prompt), which MindIE has built in, got ...
    """
    if Path(path).suffix != ".py":
        raise ValueError(f"path: expected a file name ending in .py, got {Path(path).name}")
    if not isinstance(model_type, str) or not model_type.isidentifier():
        raise ValueError(f"model_type: expected a word like 'llama', got {model_type!r}")
    shared = _shared(plan, "MindIE")
    if shared is not None:
        if (shared.window_size, plan.window_fraction) != _BUILT_IN:
            wanted = "windows of max(4000, 0.2 of the prompt), which MindIE has built in"
            raise ValueError(f"plan: expected {wanted}, got max({shared.window_size}, {plan.window_fraction:g})")
        if not shared.compensate:
            raise ValueError("plan: expected compensation, which MindIE cannot do without, got a plan without it")
        warnings.warn(
            "plan: expected its mean of N tokens to weigh N, got N ** (1 / sqrt(head_dim)) from MindIE, whose window "
            "does not slide in decode either and is rounded down, not up, where it is a fraction of the prompt",
            stacklevel=2,
        )
    rows = "".join(f"                {layer}: {heads},\n" for layer, heads in _full_heads(plan).items())
    text = (
        f'"""Retrieval heads for MindIE-LLM, written by razor-attention {__version__}."""\n\n\n'
        f"def {_FUNCTION}(model_type, num_layers):\n"
        "    first_sink, head_dict = None, None\n"
        f'    if model_type == "{model_type}" and num_layers == {plan.num_layers}:\n'
        f"        first_sink = {0 if shared is None else shared.sink_size}\n"
        "        head_dict = {\n"
        f'            "prefix_matching": {{\n{rows}            }},\n'
        '            "copying": {},\n'
        "        }\n"
        "    return head_dict, first_sink\n"
    )
    files.write_atomic(path, lambda file: file.write(text.encode()))


def load_mindie(path: files.PathLike) -> list[MindieTable]:
    """Read the tables of such a module, MindIE's own or ours, without running it.

    Args:
        path: a .py with the function get_global_wins.
    Returns:
        The tables in their order; MindIE's prefix_matching is our induction, its copying our echo.
    Raises:
        ValueError: wins.py: expected tables of heads in get_global_wins, got none
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: expected a Python module, got {type(error).__name__}") from error
    tables: list[MindieTable] = []
    for function in (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == _FUNCTION):
        words = _assigned(function.body, {})
        for branch in (x for x in ast.walk(function) if isinstance(x, ast.If)):
            try:
                tables.append(_table(_asked(branch.test) | _assigned(branch.body, words)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
    if not tables:
        raise ValueError(f"{path}: expected tables of heads in {_FUNCTION}, got none")
    return tables


def mindie_heads(path: files.PathLike, num_layers: int, sink_size: int) -> files.TwoLists:
    """The heads of the one table for a model of `num_layers`; warns where its sinks are not those that are wanted.

    Args:
        path: as in `load_mindie`.
        num_layers: of the model.
        sink_size: tokens, of the plan to be made.
    Returns:
        {"induction": {layer: [kv_head, ...]}, "echo": ...}.
    Raises:
        ValueError: wins.py: expected one table for 32 layers, got tables for 80, 40
    """
    tables = load_mindie(path)
    fitting = [table for table in tables if table.num_layers == num_layers]
    if len(fitting) != 1:
        got = ", ".join(str(table.num_layers) for table in tables)
        raise ValueError(f"{path}: expected one table for {num_layers} layers, got tables for {got}")
    if fitting[0].sink_size != sink_size:
        warnings.warn(
            f"sink_size: expected {fitting[0].sink_size} like first_sink in {path}, got {sink_size}", stacklevel=2
        )
    return fitting[0].heads


def save_golden_stick(plan: Plan, path: files.PathLike) -> dict[str, int | bool]:
    """Write the full heads as Golden Stick's retrieval_head_path; the rest of the plan are settings of its RAConfig.

    Args:
        plan: compressed heads with one policy; resolved.
        path: file to write, ending in .json.
    Returns:
        sink_size, local_capacity (which counts sinks and the mean too) and use_virtual_token for RAConfig; empty if all
        heads are full.
    Raises:
        ValueError: plan: expected one window_size for all compressed heads, all that Golden Stick has, got 10..20
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"path: expected a file name ending in .json, got {Path(path).name}")
    shared = _shared(plan, "Golden Stick", final=True)
    files.save_heads(_full_heads(plan), path)
    if shared is None:
        return {}
    if shared.compensate:
        warnings.warn(
            "plan: expected its mean of N tokens to weigh N, got 1 from Golden Stick, whose window does not slide in "
            "decode either",
            stacklevel=2,
        )
    capacity = shared.sink_size + shared.window_size + shared.compensate
    return {"sink_size": shared.sink_size, "local_capacity": capacity, "use_virtual_token": shared.compensate}


def save_duo(plan: Plan, folder: files.PathLike) -> None:
    """Write DuoAttention's pattern folder: gates of 1 for full heads, 0 for the others, sinks and window.

    Args:
        plan: compressed heads with one policy, without compensation; resolved.
        folder: to write, in a folder that exists.
    Raises:
        ValueError: plan: expected no compensation, which DuoAttention does not know, got some
    """
    shared = _shared(plan, "DuoAttention", final=True)
    if shared is not None and shared.compensate:
        raise ValueError("plan: expected no compensation, which DuoAttention does not know, got some")
    sinks = sorted(set(plan.sink_size.flatten().tolist()))  # of no effect where all heads are full, but they come back
    sink, window = (sinks[0] if len(sinks) == 1 else 0, 0) if shared is None else shared[:2]
    files.save_gates(
        plan.is_full.double(), folder, sink_size=sink, window_size=window, provenance={"provenance": plan.provenance}
    )


def load_duo(
    path: files.PathLike,
    *,
    sparsity: float | None = None,
    sink_size: int | None = None,
    window_size: int | None = None,
) -> Plan:
    """Read DuoAttention's pattern folder, or its full_attention_heads.tsv alone, as a plan; what `save_duo` wrote comes
    back as it was.

    Args:
        path: folder or file.
        sparsity: share of the heads that is compressed; None: what the gates say if each is 0 or 1, else 0.5.
        sink_size, window_size: first and last tokens that the compressed heads keep; None: as config.json beside the
            gates says, or 64 and 256 where there is none.
    Returns:
        The plan.
    Raises:
        ValueError: gates.tsv: expected 8 numbers in line 2 like in line 1, got 7
    """
    gates = files.load_gates(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    sizes = files.load_gate_sizes(folder) if files.has_gate_sizes(folder) else (64, 256)
    chosen: dict[str, Any] = {"sparsity": sparsity}
    if sparsity is None:
        chosen = {"threshold": 0.5} if bool(((gates == 0) | (gates == 1)).all()) else {"sparsity": 0.5}
    return Plan.from_gates(
        gates,
        **chosen,
        sink_size=sizes[0] if sink_size is None else sink_size,
        window_size=sizes[1] if window_size is None else window_size,
    )


class _Shared(NamedTuple):
    """What all compressed heads have in common."""

    sink_size: int
    window_size: int
    compensate: bool


def _shared(plan: Plan, whose: str, *, final: bool = False) -> _Shared | None:
    """None if no head is compressed. final: refuse windows that depend on the prompt."""
    if bool(plan.is_full.all()):
        return None
    if final and plan.window_fraction:
        got = f"at least {100 * plan.window_fraction:g} % of the prompt; resolve it"
        raise ValueError(f"plan: expected windows that are final, all that {whose} has, got {got}")
    values = []
    for name in _Shared._fields:
        found = sorted(set(getattr(plan, name)[~plan.is_full].tolist()))
        if len(found) > 1:
            got = "both" if name == "compensate" else f"{found[0]}..{found[-1]}"
            raise ValueError(f"plan: expected one {name} for all compressed heads, all that {whose} has, got {got}")
        values += found
    return _Shared(*values)


def _full_heads(plan: Plan) -> files.LayerHeads:
    layers = enumerate(plan.is_full.tolist())
    return {layer: [head for head, full in enumerate(row) if full] for layer, row in layers if any(row)}


def _table(said: dict[str, Any]) -> MindieTable:
    """Check what one branch asks for and assigns."""
    kinds = {"model_type": str, "num_layers": int, "first_sink": int, "head_dict": dict}
    for name, kind in kinds.items():
        if type(said.get(name)) is not kind:
            raise TypeError(f"{name}: expected a plain {kind.__name__}, got {short(said.get(name))}")
    table, num_layers = said["head_dict"], said["num_layers"]
    if set(table) != {"prefix_matching", "copying"}:
        raise ValueError(f"head_dict: expected the keys 'prefix_matching' and 'copying', got {short(list(table))}")
    if (last := max(files.merge_heads(table), default=-1)) >= num_layers:
        raise ValueError(f"head_dict: expected layers below {num_layers}, got {last}")
    check_int("first_sink", said["first_sink"], 0)
    two = {"induction": table["prefix_matching"], "echo": table["copying"]}
    heads = {word: {layer: sorted(part[layer]) for layer in sorted(part) if part[layer]} for word, part in two.items()}
    return MindieTable(said["model_type"], num_layers, said["first_sink"], heads)


def _assigned(body: list[ast.stmt], words: dict[str, Any]) -> dict[str, Any]:
    """Values of the plain assignments `name = value` of a block, names in them looked up in `words`."""
    found = {}
    for line in body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            found[line.targets[0].id] = _value(line.value, words)
    return found


def _value(node: ast.expr, words: dict[str, Any]) -> Any:
    """A constant, list, dict or known name; None for what only running the code would tell."""
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key, words) for key in node.keys]
        if len({repr(key) for key in keys}) != len(keys) or not all(isinstance(key, str | int) for key in keys):
            return None
        return dict(zip(keys, (_value(value, words) for value in node.values), strict=True))
    if isinstance(node, ast.List):
        return [_value(value, words) for value in node.elts]
    if isinstance(node, ast.Name):
        return words.get(node.id)
    return node.value if isinstance(node, ast.Constant) else None


def _asked(test: ast.expr) -> dict[str, Any]:
    """What `name == constant and ...` asks for: {name: constant}."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    found = {}
    for part in parts:
        match part:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[ast.Constant(value=value)]):
                found[name] = value
    return found
