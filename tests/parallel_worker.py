# SPDX-License-Identifier: Apache-2.0
"""The cases of test_parallel.py, and the program of one rank, which runs them and writes down what came out.

python parallel_worker.py FOLDER, with RANK set: checkpoints are FOLDER/<name>, results FOLDER/<rank>.pt. The ranks meet
in a file and talk over the loopback interface.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import tiny_models as tiny
from razor_attention import FULL, Plan, RazorCache, attach, cli, dropped_mass, find_heads
from razor_attention.duo import train_gates
from razor_attention.hf.names import output_cache

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
GATHERED = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
GATHERED["model.layers.*.self_attn.o_proj"] = "rowwise_split_input"
ATTENTION = "transformer.h.*.self_attention."
FUSED = {ATTENTION + "query_key_value": "colwise", ATTENTION + "dense": "rowwise"}
# checkpoint: tp_plan. The last two cannot be cut for two ranks: 3 kv heads, and 1.
CHECKPOINTS: dict[str, Any] = {
    "llama": "auto",
    "gathered": GATHERED,
    "qwen3": "auto",
    "bloom": FUSED,
    "falcon, groups": FUSED,
    "uneven": "auto",
    "single": "auto",
}
# Every kind of head, other ones on each rank, so that a wrong cut shows in answers and bytes.
MIXED = Plan(
    sink_size=[[0, 4, 2, 3], [3, 0, 5, 0]],
    window_size=[[FULL, 8, 12, 70], [17, FULL, 1, 9]],
    compensate=[[False, True, False, True], [True, False, True, True]],
)
RULE = Plan(MIXED.sink_size, MIXED.window_size, MIXED.compensate, window_fraction=0.4)
FULL_PLAN = Plan.full(2, 4)
DEMO_PLAN = Plan.from_heads({0: [1], 2: [0, 3]}, num_layers=4, num_kv_heads=4, min_window=16)
WINDOWS = Plan.from_windows(
    [[3, 90, 200, 20, 9, 33, 7, 64], [300, 5, 11, 80, 15, 2, 41, 23]], num_layers=2, num_kv_heads=8
)
PAIR = Plan.from_windows([[9, 90], [200, 11]], num_layers=2, num_kv_heads=2)
# case: checkpoint, plan, options of attach
CASES: dict[str, tuple[str, Plan, dict[str, Any]]] = {
    "full": ("llama", FULL_PLAN, {}),
    "mixed": ("llama", MIXED, {}),
    "streaming prefill": ("llama", MIXED, {"prefill": "streaming"}),
    "length rule": ("llama", RULE, {}),
    "int8": ("llama", MIXED, {"kv_dtype": "int8"}),
    "int4": ("llama", MIXED, {"kv_dtype": "int4"}),
    "gathered keys": ("gathered", MIXED, {}),
    "qwen3": ("qwen3", MIXED, {}),
    "bloom": ("bloom", WINDOWS, {}),
    "falcon": ("falcon, groups", PAIR, {}),
}
LENGTHS = (150, 131)  # of the prompts, padded on the left
NEW_TOKENS = 24
DEMO = Path(__file__).parents[1] / "bench" / "model"  # has a tokenizer, for the command line
WORLD_SIZE = 2


class Tokenizer:
    """What find_heads asks of one."""

    all_special_ids = (tiny.PAD, tiny.EOS)

    def __len__(self) -> int:
        return tiny.VOCABULARY

    def __call__(self, text: str) -> Any:
        return type("Ids", (), {"input_ids": [5]})


def make(folder: Path) -> None:
    """Write all checkpoints."""
    for name in CHECKPOINTS:
        if name in ("bloom", "falcon, groups"):
            model = tiny.alibi_model(name)
        else:
            heads = {
                "uneven": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
                "single": {"num_key_value_heads": 1},
            }
            model = tiny.tiny_model("qwen3" if name == "qwen3" else "llama", **SHAPE | heads.get(name, {}))
        model.save_pretrained(folder / name)
    DEMO_PLAN.save(folder / "plan.json")


def loader(folder: Path, *, parallel: bool) -> Callable[[str], PreTrainedModel]:
    """Checkpoints by name, whole or this rank's part of them."""

    @cache
    def load(name: str) -> PreTrainedModel:
        options = {"distributed_config": DistributedConfig(tp_plan=CHECKPOINTS[name])} if parallel else {}
        return AutoModelForCausalLM.from_pretrained(folder / name, **options)  # type: ignore[no-any-return]

    return load


def results(models: Callable[[str], PreTrainedModel], folder: Path) -> dict[str, Any]:
    """What every case gives with the models of this process."""
    found: dict[str, Any] = {}
    ids, mask = tiny.prompts(*LENGTHS)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    for case, (name, plan, how) in CASES.items():
        with attach(models(name), plan, **how) as model:
            out = model.generate(ids, return_dict_in_generate=True, **options)
        found[case] = out.sequences[:, ids.shape[1] :], output_cache(out).nbytes
    llama = models("llama")
    found["stock"] = tiny.answer(llama, ids, mask)
    with attach(llama, MIXED):
        found["beams"] = tiny.answer(llama, ids, mask, num_beams=3)
        found["conversation"] = tiny.conversation(llama, RazorCache(llama.config, MIXED))
    scores = find_heads(llama, Tokenizer(), period=40, progress=False)
    found["scores"] = scores.echo, scores.induction
    found["mass"] = dropped_mass(models("bloom"), ids[:1], progress=False)
    with redirect_stdout(StringIO()) as printed:
        flags = [
            "--plan",
            str(folder / "plan.json"),
            "--prompt",
            "mia hid lamp rope coin bell . the old wind moves over the quiet hill . ? mia hid",
            "--max-new-tokens",
            "8",
            "--compare",
        ]
        assert cli.main(["generate", str(DEMO), *flags]) in (0, None)
    found["printed"] = printed.getvalue()
    return found


def refusals(models: Callable[[str], PreTrainedModel]) -> dict[str, str]:
    """What is said to what cannot be done."""
    calls: dict[str, Callable[[], Any]] = {
        "3 kv heads": lambda: RazorCache(models("uneven").config, Plan.full(2, 3)),
        "1 kv head": lambda: attach(models("single"), Plan.full(2, 1)).__enter__(),
        "find_heads": lambda: find_heads(models("uneven"), Tokenizer(), period=40, progress=False),
        "a plan that is cut already": lambda: RazorCache(models("llama").config, MIXED.shard(0, WORLD_SIZE)),
        "gates": lambda: train_gates(models("llama"), None, samples=iter(())),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def measured(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of this rank's weights, and bytes that it gives to be added up for one token."""
    weights = [getattr(weight, "_local_tensor", weight) for weight in model.parameters()]
    given, add_up = [], distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        given.append(tensor.nbytes)
        return add_up(tensor, *args, **options)

    distributed.all_reduce = counted
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    distributed.all_reduce = add_up
    return {"weights": sum(weight.nbytes for weight in weights), "reduced": sum(given)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=200)
    )
    models = loader(folder, parallel=True)
    wrote = {"results": results(models, folder), "refusals": refusals(models), "measured": measured(models("llama"))}
    torch.save(wrote, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
