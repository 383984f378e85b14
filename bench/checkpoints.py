# SPDX-License-Identifier: Apache-2.0
"""What do find_windows and find_heads take when they are given files, not a model? Time and growth of resident memory.

The checkpoints have random weights and are written one layer at a time, a safetensors shard each:

    windows  Baichuan2-13B's sizes, all of them: 40 layers, 40 heads, hidden 5120, bf16, 28 GB
    heads    Llama-3.1-70B's proportions at a quarter of its width: 16 layers, 16 query and 2 kv heads of 128, hidden
             2048, intermediate 7168, bf16, 1.9 GB; against the same model loaded as usual

Each measurement has a process of its own. Growth is the peak resident size, mapped pages of the files counted, minus
that right before the call. What a 70B model would take is worked out from the parts, and printed as such.

Example: python -m razor_attention.bench.checkpoints --folder /scratch --question windows heads
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from razor_attention import find_heads, find_windows

from .harness import RESULTS, Row, Timing, append_rows, make_row, table
from .memory import Peak, status_bytes

BAICHUAN_13B = {
    "model_type": "baichuan",
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "model_max_length": 4096,
    "vocab_size": 125696,
}
LLAMA_QUARTER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "vocab_size": 32000,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_QUARTER | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
VARIANTS = {"windows": ("msmodelslim", "per_head", "theorem"), "heads": ("files", "loaded")}
PERIOD, REPEATS = 500, 4  # of the probe


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Weights of one layer, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if config["model_type"] == "baichuan":
        return {"self_attn.W_pack": (3 * hidden, hidden), "self_attn.o_proj": (hidden, hidden)} | mlp | norms
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    q, kv = (heads * size, hidden), (kv_heads * size, hidden)
    sides = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": q[::-1]}
    return sides | mlp | norms


def write_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """Random weights, std 0.02, one shard for each layer and one for the rest; never more than a layer in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    draw, index = torch.Generator().manual_seed(0), {}

    def random(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=draw) * 0.02).bfloat16()

    def save(tensors: dict[str, Tensor], shard: str) -> None:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, shard))

    of_vocabulary = (config["vocab_size"], config["hidden_size"])
    rest = {"model.embed_tokens": of_vocabulary, "lm_head": of_vocabulary, "model.norm": of_vocabulary[1:]}
    save({f"{name}.weight": random(shape) for name, shape in rest.items()}, "rest.safetensors")
    for layer in tqdm(range(config["num_hidden_layers"]), desc="writing", unit="layer", disable=None):
        named = {f"model.layers.{layer}.{name}.weight": random(shape) for name, shape in shapes(config).items()}
        save(named, f"layer-{layer:02}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def layer_bytes(config: dict[str, Any]) -> int:
    """Of one layer's weights in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes(config).values())


def new_tokenizer(vocab_size: int) -> Any:
    """One word for each id; find_heads wants no more of it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")  # type: ignore[no-untyped-call]


def call_of(question: str, variant: str, folder: Path) -> Callable[[], object]:
    """What is measured."""
    if question == "windows":
        return lambda: find_windows(folder, method=variant)
    tokenizer = new_tokenizer(LLAMA_QUARTER["vocab_size"])
    if variant == "files":
        return lambda: find_heads(folder, tokenizer, period=PERIOD, repeats=REPEATS)

    def load_and_find() -> object:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return find_heads(model, tokenizer, period=PERIOD, repeats=REPEATS)

    return load_and_find


def measure(question: str, variant: str, folder: Path) -> tuple[float, int, int]:
    """Seconds, growth and peak in bytes of one call in this process."""
    call = call_of(question, variant, folder)
    before = status_bytes("VmRSS")
    with Peak().start() as peak:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin, peak.bytes() - before, peak.bytes()


def measure_all(question: str, folder: Path) -> Iterator[tuple[str, float, int, int]]:
    """(variant, seconds, growth, peak) of each in a process of its own."""
    for variant in VARIANTS[question]:
        flags = ["--question", question, "--variant", variant, "--folder", str(folder)]
        command = [sys.executable, "-m", "razor_attention.bench.checkpoints", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds, growth, peak = json.loads(done.stdout.splitlines()[-1])
        yield variant, seconds, growth, peak


def arithmetic(growth: int) -> str:
    """What the growth means for 70B: nothing of a model is in memory but the part that runs, and activations."""
    quarter, whole = LLAMA_QUARTER, LLAMA_70B
    tokens, ratio = 1 + 2500 * REPEATS, whole["hidden_size"] / quarter["hidden_size"]
    activations = growth - layer_bytes(quarter)
    scaled = activations * ratio * tokens / (1 + PERIOD * REPEATS)
    return (
        f"a layer here is {layer_bytes(quarter) / 1e6:.0f} MB, so that of the growth at most "
        f"{activations / 1e6:.0f} MB are activations of {1 + PERIOD * REPEATS} tokens.\n"
        f"Llama-3.1-70B: a layer of {layer_bytes(whole) / 1e9:.2f} GB; activations grow with width and tokens, "
        f"x{ratio:.0f} and {tokens} tokens: {scaled / 1e9:.1f} GB; "
        f"together {(layer_bytes(whole) + scaled) / 1e9:.1f} GB instead of "
        f"{whole['num_hidden_layers'] * layer_bytes(whole) / 1e9:.0f} GB of weights (worked out, not run)"
    )


def run(question: str, scratch: Path, on: str | None) -> list[Row]:
    """Write the checkpoint, measure all variants, print, and remove it."""
    config = BAICHUAN_13B if question == "windows" else LLAMA_QUARTER
    name = "13B, 40 layers, hidden 5120" if question == "windows" else "70B at 1/4 width, 16 layers, hidden 2048"
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "checkpoint"
    try:
        write_checkpoint(config, folder)
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
        rows, cells, growths = [], [], {}
        for variant, seconds, growth, peak in measure_all(question, folder):
            case = f"find_{question} {name}, {on_disk / 1e9:.1f} GB"
            rows.append(make_row("checkpoints", case, variant, Timing(seconds * 1e6, 0.0), nbytes=growth, on=on))
            cells.append((case, variant, seconds, growth / 1e6, peak / 1e6))
            growths[variant] = growth
    finally:
        shutil.rmtree(folder.parent)
    print(table(("case", "variant", "s", "growth MB", "peak of the process MB"), cells))
    if question == "heads":
        print(arithmetic(growths["files"]))
    return rows


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--question", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="(default: both)")
    flags.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the checkpoints, 30 GB")
    flags.add_argument("--variant", help="measure this one, of a checkpoint in --folder, and print it as JSON")
    flags.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    flags.add_argument("--machine", default=None, help="name of this machine in them")
    arguments = flags.parse_args(argv)
    if arguments.variant:
        print(json.dumps(measure(arguments.question[0], arguments.variant, arguments.folder)))
        return
    rows = [row for question in arguments.question for row in run(question, arguments.folder, arguments.machine)]
    print(f"appended to {append_rows(rows, arguments.results)}")


if __name__ == "__main__":
    main()
