# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands of `razor` do, given checked arguments (cli.py); each prints its result."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import FULL, HeadScores, Plan, __version__, files
from .atb import OFFSETS as OFFSETS
from .export import TARGETS as TARGETS
from .export import export_plan, load_duo, mindie_heads

DTYPES = ("auto", "float32", "bfloat16", "float16")
LENGTHS = (4096, 8192, 16384, 32768, 131072)  # tokens, where sizes are shown
_POLICY: dict[str, dict[str, Any]] = {  # source of a plan -> the policy flags that it takes, and their defaults
    "heads": {"sink_size": 4, "window_size": 4000, "window_fraction": 0.2, "no_compensation": False},
    "scores": {
        **{"sink_size": 4, "window_size": 4000, "window_fraction": 0.2, "no_compensation": False},
        **{"budget": None, "length": None},
    },
    "windows": {},
    "gates": {"sink_size": None, "window_size": None, "sparsity": None},  # what the gates' folder says
    "streaming": {"sink_size": 4, "window_size": 4000},
    "full": {},
}


def heads(arguments: Namespace) -> None:
    """Score the heads of a model, choose, and write what is wanted."""
    from . import find_heads
    from .hf.models import load_model

    plot = _bench("plot").plot_scores if arguments.plot else None
    probe: dict[str, Any] = {"period": arguments.period, "repeats": arguments.repeats, "seed": arguments.seed}
    if arguments.dtype == "auto":
        scores = find_heads(arguments.model, **probe)  # used as they are stored, weights can stay in their files
    else:
        scores = find_heads(*load_model(arguments.model, arguments.dtype), **probe)
    chosen = scores.select(arguments.induction_ratio, arguments.echo_ratio)
    files.save_heads(chosen, arguments.out)
    if arguments.scores:
        scores.save(arguments.scores)
    if plot:
        plot(scores, chosen, arguments.plot)
    _print_scores(scores, chosen)
    print(f"probe: {scores.provenance['period']} random tokens x {scores.provenance['repeats']}")
    print(f"wrote {', '.join(str(path) for path in (arguments.out, arguments.scores, arguments.plot) if path)}")


def windows(arguments: Namespace) -> None:
    """Find the windows of an ALiBi model, write them, and tell what they drop of a text if there is one."""
    from . import dropped_mass, find_windows
    from .alibi import smallest_windows
    from .hf.models import load_model

    plot = _bench("plot").plot_windows if arguments.plot else None
    method, mass = arguments.method, None
    if arguments.text:
        model, tokenizer = load_model(arguments.model, arguments.dtype)
        ids = tokenizer(_text(arguments.text), return_tensors="pt").input_ids[:, : arguments.tokens]
        mass = dropped_mass(model, ids)  # [layers, heads, tokens + 1]
    elif method == "calibrated":
        raise ValueError("--text: expected a file with --method calibrated, got none")
    if arguments.per_layer and method == "msmodelslim":
        raise ValueError("--per-layer: expected another --method than msmodelslim, got it")
    if method == "calibrated":
        assert mass is not None
        each = smallest_windows(mass, arguments.theta)
        found = each if arguments.per_layer else each.amax(0)
    else:
        rule = {"theta": arguments.theta, "alpha": arguments.alpha, "method": method}
        found = find_windows(arguments.model, per_layer=arguments.per_layer, **rule)
    files.save_windows(found, arguments.out)
    if plot:
        plot(found, method, arguments.plot)
    _print_windows(arguments.out, found)
    if mass is not None:
        inside = found.clamp(0, mass.shape[-1] - 1).expand(mass.shape[:2])
        dropped, tokens = mass.gather(-1, inside[..., None])[..., 0], mass.shape[-1] - 1  # [layers, heads]
        print(f"of {tokens} tokens of {arguments.text}, no query loses more than {dropped.max():.2g} of its attention:")
        print("\n".join(" ".join(f"{share:.1g}" for share in row) for row in dropped.tolist()))
        if method == "calibrated" and int(found.max()) > 0.9 * tokens:
            warnings.warn(
                f"--text: expected a text longer than every head reads, got {tokens} tokens and a window of "
                f"{int(found.max())}; windows say nothing about longer texts",
                stacklevel=2,
            )
    print(f"wrote {', '.join(str(path) for path in (arguments.out, arguments.plot) if path)}")


def gates(arguments: Namespace) -> None:
    """Train one gate for each kv head and write DuoAttention's pattern folder."""
    from .duo import read_samples, train_gates
    from .hf.models import load_model

    if not arguments.out.absolute().parent.is_dir():  # checked before the work, not after it
        raise ValueError(f"--out: expected a folder in an existing folder, got {str(arguments.out)!r}")
    names = "sink_size", "window_size", "steps", "learning_rate", "l1", "seed", "checkpoint", "recompute"
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    text = _text(arguments.text) if arguments.text else None
    model, tokenizer = load_model(arguments.model, arguments.dtype)
    options |= {"samples": read_samples(arguments.samples, tokenizer)} if text is None else {"text": text}
    trained = train_gates(model, tokenizer, **options)
    trained.save(arguments.out)
    for layer, row in enumerate(trained.gates.tolist()):
        print(f"{layer:>5}  " + " ".join(f"{gate:.2f}" for gate in row))
    print("1 full, 0 sinks + window; one column for each kv head")
    print(f"wrote {arguments.out}; next: razor plan --gates {arguments.out}")


def plan(arguments: Namespace) -> None:
    """Make a plan from one of the sources, write and describe it."""
    source = next(name for name in _POLICY if getattr(arguments, name))
    policy = _policy(source, arguments)
    layers, kv_heads, geometry, dtype = arguments.layers, arguments.kv_heads, None, torch.bfloat16
    if arguments.model:
        from .hf.models import load_geometry

        geometry, dtype = load_geometry(arguments.model)
        layers, kv_heads = layers or geometry.num_layers, kv_heads or geometry.num_kv_heads
    if source not in ("gates", "scores") and None in (layers, kv_heads):
        raise ValueError("--layers, --kv-heads: expected both, or --model, got fewer")
    made = _make_plan(source, getattr(arguments, source), policy, layers, kv_heads, dtype)
    if geometry:
        made.check_model(geometry.num_layers, geometry.num_kv_heads)
    file = getattr(arguments, source)
    said = {name: value for name, value in policy.items() if value is not None}
    made.provenance.update({"method": source, **said, "version": __version__})
    made.provenance.update({"file": file.name} if isinstance(file, Path) else {})
    made.provenance.update({"model": arguments.model.resolve().name} if arguments.model else {})
    made.save(arguments.out)
    print(made)
    if geometry:
        _print_sizes(made, sorted({*LENGTHS, policy.get("length", LENGTHS[0])}), geometry.head_dim, dtype)
    print(f"wrote {arguments.out}")


def inspect(arguments: Namespace) -> None:
    """Say what a file is, and print it."""
    path: Path = arguments.file
    with path.open("rb") as file:
        is_json = file.read(64).lstrip().startswith(b"{")
    kind = files.read_json(path).get("format") if is_json else None
    if kind == "razor-attention plan":
        loaded = Plan.load(path)
        print(f"{path}: {loaded}")
        tables = zip(loaded.is_full.tolist(), loaded.compensate.tolist(), strict=True)
        _print_map("".join("#" if f else "c" if c else "." for f, c in zip(*row, strict=True)) for row in tables)
        print("# full, c sinks + window + compensation, . sinks + window; one column for each kv head")
        _print_sizes(loaded, arguments.length, head_dim=128, dtype=torch.bfloat16)
        _print_provenance(loaded.provenance)
    elif kind == "razor-attention scores":
        scores = HeadScores.load(path)
        print(f"{path}: scores")
        _print_scores(scores, scores.select())
        _print_provenance(scores.provenance)
    elif kind is not None:
        raise ValueError(f"{path}: expected a plan, scores, heads or windows, got format {kind!r}")
    elif not is_json and (table := _windows(path)) is not None:
        _print_windows(path, table)
    else:
        found = files.load_heads(path)
        union = files.merge_heads(found)
        print(f"{path}: {sum(map(len, union.values()))} retrieval kv heads in {len(union)} layers")
        shape = max(union, default=-1) + 1, max((row[-1] for row in union.values()), default=-1) + 1
        _print_map(_signs(found, *shape))
        print("I induction, E echo, B both, # not said which; nothing is known of later layers and kv heads")


def export(arguments: Namespace) -> None:
    """Write a plan in the form of another runtime."""
    names = sorted({name for taken in TARGETS.values() for name in taken})
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    said = export_plan(Plan.load(arguments.plan), arguments.to, arguments.out, given)
    print(f"{said}\nwrote {arguments.out}")


def generate(arguments: Namespace) -> None:
    """Generate greedily with the plan's cache, and with the full one too to compare. Under torchrun each process
    runs its part of the model, and the first one tells."""
    from . import attach
    from .hf.models import load_model, text_config
    from .hf.names import output_cache
    from .hf.parallel import kv_shard

    text = arguments.prompt
    if text is None:
        text = sys.stdin.read() if arguments.stdin else _text(arguments.prompt_file)
    loaded = Plan.load(arguments.plan)
    model, tokenizer = load_model(arguments.model, "auto", parallel=True)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise ValueError(f"prompt: expected at least one token, got {text!r}")
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + arguments.max_new_tokens > longest:
        got = f"{ids.shape[1]} + {arguments.max_new_tokens}"
        warnings.warn(
            f"prompt: expected at most {longest} tokens with the answer, the positions that this model knows, got "
            f"{got}; a smaller cache does not give it more of them",
            stacklevel=2,
        )
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens}
    if arguments.chunk:
        options["prefill_chunk_size"] = arguments.chunk

    def run() -> tuple[str, _Clock, Any]:
        clock, mask = _Clock(), torch.ones_like(ids)
        run_model: Any = model.generate
        out = run_model(ids, attention_mask=mask, streamer=clock, return_dict_in_generate=True, **options)
        text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return str(text), clock, output_cache(out)

    kept = {"kv_dtype": arguments.kv, "exact_sink": arguments.exact[0], "exact_window": arguments.exact[1]}
    with attach(model, loaded, prefill=arguments.prefill, **kept):
        answer, clock, cache = run()
    full_answer, full_clock, full = run() if arguments.compare else (None, None, None)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    where = " on the first process" if kv_shard(model.config)[1] > 1 else ""
    layer: Any = cache.layers[0].cache
    tokens, heads = int(layer.seen[0]), cache.plan.num_layers * cache.plan.num_kv_heads
    full_bytes = 2 * tokens * heads * layer.head_dim * model.dtype.itemsize  # as transformers keeps it, without pages
    if full is not None:
        print(f"{full_answer}\nfull cache: {_size(full_bytes)} of KV{where}; {full_clock}\n")
    share = f"{cache.nbytes / full_bytes:.2f} of the full cache's {_size(full_bytes)}"
    print(f"{answer}\nrazor: {_size(cache.nbytes)} of KV for {tokens} tokens{where}, {share}; {clock}")


def evaluate(arguments: Namespace) -> None:
    """Ask generated questions with the cache kept in different ways; results.csv and pictures of it."""
    from . import find_heads
    from .hf import eval as hf_eval
    from .hf.models import geometry, load_model

    plot, out = _bench("plot_eval").plot_eval, arguments.out
    text = _text(arguments.text) if arguments.text else None
    model, tokenizer = load_model(arguments.model, arguments.dtype)

    def scores() -> HeadScores:
        if arguments.scores:
            return HeadScores.load(arguments.scores)
        found = find_heads(model, tokenizer)
        out.mkdir(parents=True, exist_ok=True)
        found.save(out / "scores.json")
        return found

    policy = {"sink_size": arguments.sink_size, "window_size": arguments.window_size}
    methods = hf_eval.make_methods(
        arguments.methods,
        geometry(model.config),
        model.dtype,
        scores=scores,
        gates=_duo_gates,
        kv=arguments.kv,
        **policy,
    )
    settings = hf_eval.Settings(
        tasks=arguments.tasks,
        lengths=arguments.lengths,
        budgets=arguments.budget,
        samples=arguments.samples,
        seed=arguments.seed,
        depths=arguments.depths,
        prefill=arguments.prefill,
        text=text,
        **({"task_file": hf_eval.TaskFile.load(arguments.task_file)} if arguments.task_file else {}),
    )
    sources = {name: str(getattr(arguments, name) or "") for name in ("text", "scores", "dtype")}
    rows = hf_eval.evaluate(model, tokenizer, methods, out, settings, fixed={**policy, **sources})
    print(hf_eval.summary(rows))
    written = [out / "results.csv", *plot(out / "results.csv", out)]
    print(f"wrote {', '.join(str(path) for path in written)}")


def _duo_gates(folder: str) -> tuple[torch.Tensor, int, int]:
    """Gates, sinks and window of DuoAttention's folder."""
    return files.load_gates(folder), *files.load_gate_sizes(folder)


def demo(arguments: Namespace) -> None:
    """Run the demo with the shipped models, or its first half with another one of its kind."""
    from .hf.models import load_model

    bench = _bench("demo")
    folder: Path = arguments.model or bench.MODEL
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: expected the shipped model in {folder}, got none; name the folder of another one")
    bench.run(*load_model(folder, "auto"), arguments.out, lengths=arguments.length, questions=arguments.questions)
    if arguments.model is None:
        print()
        alibi = _bench("alibi_demo")
        alibi.run(*load_model(alibi.MODEL, "auto"), arguments.out, length=min(4096, max(arguments.length)))
    print(f"\nin {arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")


def bench(arguments: Namespace) -> None:
    """Time the main figures on this machine."""
    _bench("quick").run(threads=arguments.threads)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: expected text in UTF-8, got byte {byte:#x} at place {error.start}") from error


class _Clock:
    """A streamer for `generate` which notes when tokens come: first the prompt, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def __str__(self) -> str:
        start, first, last, steps = self.times[0], self.times[1], self.times[-1], len(self.times) - 2
        return f"prefill {first - start:.2f} s" + (f", {steps / (last - first):.1f} tokens/s" if steps else "")


def _bench(name: str) -> Any:
    """A module of the bench room, which needs packages that the library does without."""
    try:
        return importlib.import_module(f"razor_attention.bench.{name}")
    except ModuleNotFoundError as error:
        hint = "pip install 'razor-attention[demo]'"
        raise ImportError(f"{error.name}: expected to be installed, got no such module; {hint}") from error


def _policy(source: str, arguments: Namespace) -> dict[str, Any]:
    """The defaults of a source, with the flags that were given; flags that it has no use for are refused."""
    policy = dict(_POLICY[source])
    for name in sorted({key for taken in _POLICY.values() for key in taken}):
        value = getattr(arguments, name)
        if value is not None and name not in policy:
            takers = " or ".join(f"--{other}" for other, taken in _POLICY.items() if name in taken)
            raise ValueError(f"--{name.replace('_', '-')}: expected {takers} with it, got --{source}")
        policy |= {} if value is None else {name: value}
    return policy


def _make_plan(
    source: str, file: Any, policy: dict[str, Any], layers: int | None, kv_heads: int | None, dtype: torch.dtype
) -> Plan:
    sinks, window = policy.get("sink_size", 0), policy.get("window_size", FULL)
    size: dict[str, Any] = {"num_layers": layers, "num_kv_heads": kv_heads}
    if source in ("heads", "scores"):
        rule: dict[str, Any] = {"sink_size": sinks, "min_window": window, "compensate": not policy["no_compensation"]}
        rule["window_fraction"] = policy["window_fraction"]
        if source == "heads":
            found = mindie_heads(file, size["num_layers"], sinks) if file.suffix == ".py" else files.load_heads(file)
            return Plan.from_heads(found, **size, **rule)
        if None in (budget := policy["budget"], length := policy["length"]):
            raise ValueError("--budget, --length: expected both with --scores, got fewer")
        scores = HeadScores.load(file)
        rule["provenance"] = scores.provenance
        made = Plan.from_ranking(scores.ranking(), budget=budget, seq_len=length, dtype=dtype, **rule)
        made.check_model(layers or made.num_layers, kv_heads or made.num_kv_heads)
        return made
    if source == "windows":
        return Plan.from_windows(files.load_windows(file), **size)
    if source == "gates":
        made = load_duo(file, **policy)
        made.check_model(layers or made.num_layers, kv_heads or made.num_kv_heads)
        return made
    return Plan.streaming(sink_size=sinks, window_size=window, **size)


def _windows(path: Path) -> torch.Tensor | None:
    """None if the file holds something else."""
    try:
        return files.load_windows(path)
    except ValueError:
        return None


def _print_windows(path: Path, found: torch.Tensor) -> None:
    print(f"{path}: ALiBi windows of {list(found.shape)} heads, {found.min()}..{found.max()} tokens")
    print("\n".join(" ".join(map(str, row)) for row in found.view(-1, found.shape[-1]).tolist()))


def _print_scores(scores: HeadScores, chosen: files.TwoLists) -> None:
    num_layers, num_heads = scores.echo.shape
    count = sum(map(len, files.merge_heads(chosen).values()))
    print(f"{num_layers} layers x {num_heads} heads, {scores.num_kv_heads} kv heads; {count} retrieval kv heads")
    best = zip(scores.induction.amax(1).tolist(), scores.echo.amax(1).tolist(), strict=True)
    width = max(scores.num_kv_heads, 8)
    print(f"layer  {'kv heads'.ljust(width)}  induction  echo (highest)")
    for layer, (signs, scored) in enumerate(zip(_signs(chosen, num_layers, scores.num_kv_heads), best, strict=True)):
        print(f"{layer:>5}  {signs.ljust(width)}  {scored[0]:>9.4f}  {scored[1]:.4f}")
    print("I induction, E echo, B both, . compressed")


def _signs(chosen: files.LayerHeads | files.TwoLists, num_layers: int, num_kv_heads: int) -> list[str]:
    """One character for each kv head."""
    lists: dict[Any, Any] = dict(chosen)
    sides = [lists["induction"], lists["echo"]] if "induction" in lists else [lists]
    letters = ".IEB" if len(sides) == 2 else ".#"
    return [
        "".join(
            letters[sum((head in side.get(i, [])) << bit for bit, side in enumerate(sides))]
            for head in range(num_kv_heads)
        )
        for i in range(num_layers)
    ]


def _print_map(rows: Iterable[str]) -> None:
    for layer, row in enumerate(rows):
        print(f"{layer:>5}  {row}")


def _print_sizes(shown: Plan, lengths: Sequence[int], head_dim: int, dtype: torch.dtype) -> None:
    print(f"  tokens  KV cache      full  share   (head_dim {head_dim}, {str(dtype).removeprefix('torch.')})")
    whole = Plan.full(shown.num_layers, shown.num_kv_heads)
    for length in lengths:
        held, full = (one.kv_bytes(length, head_dim=head_dim, dtype=dtype) for one in (shown, whole))
        print(f"{length:>8}  {_size(held):>8}  {_size(full):>8}  {held / full:>5.3f}")


def _print_provenance(provenance: dict[str, Any]) -> None:
    print("provenance: " + (", ".join(f"{key} {value}" for key, value in provenance.items()) or "not said"))


def _size(count: float) -> str:
    power = 0
    while count >= 999.5 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"
