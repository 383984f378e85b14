# SPDX-License-Identifier: Apache-2.0
"""Every door that meets transformers, once, in a process where what is deprecated is an error: `test_compat_quiet.py`.

Prints what transformers logged. Arguments: a folder to write to, the folder of the small model.
"""

import contextlib
import io
import logging
import shlex
import sys
import warnings
from pathlib import Path

import torch
from razor_attention.bench import methods
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from razor_attention import Plan, RazorCache, attach, cli, dropped_mass, duo, find_heads, find_windows
from razor_attention.hf.names import CACHE


def library(folder: Path, model_folder: Path) -> None:
    """The functions."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.arange(20, 60)[None]
    plan = Plan.streaming(4, 4, 2, 8)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    find_heads(model, tokenizer, period=10, progress=False)
    find_heads(model_folder, period=10, progress=False)
    duo.train_gates(
        model, samples=[([5, 6, 7, 8], [False, True, True, True])], steps=1, sink_size=1, window_size=2, progress=False
    )
    with attach(model, plan), torch.no_grad():
        model.generate(ids, **options)
        model.generate(ids, num_beams=2, **options)
        cache = RazorCache(model.config, plan)
        model(ids, **{CACHE: cache})
        cache.save(folder / "book.safetensors", model)
        for fork in [*cache.fork(2), RazorCache.load(folder / "book.safetensors", model)]:
            model.generate(torch.cat([ids, ids[:, :3]], 1), max_new_tokens=2, **{CACHE: fork})
    duo.enable_duo_attention_eval(model, torch.zeros(4, 4), 2, 8)
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: getattr(model(ids), CACHE)})
    duo.disable_duo_attention_eval(model)

    bloom = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)).eval()
    dropped_mass(bloom, ids, progress=False)
    windows = find_windows(bloom, method="per_head", progress=False)
    with attach(bloom, Plan.from_windows(windows.clamp(max=20), num_layers=2, num_kv_heads=4)):
        bloom.generate(ids, **options)


def commands(folder: Path, model_folder: Path, text: Path) -> None:
    """The command line."""
    model, plan = str(model_folder), str(folder / "plan.json")
    tasks = str(methods.TASK_FILE)
    samples = folder / "samples.jsonl"
    samples.write_text('{"prompt": "mia hid lamp", "answer": "rope coin"}\n')
    evaluation = shlex.split("--tasks needle --lengths 256 --samples 1 --depths 1 --budget 0.6 --methods full razor")
    for line in (
        ["heads", model, "--out", str(folder / "h.pt"), "--period", "10"],
        ["plan", "--heads", str(folder / "h.pt"), "--model", model, "--out", plan],
        ["generate", model, "--plan", plan, "--prompt-file", str(text), "--max-new-tokens", "2", "--compare"],
        ["gates", model, "--samples", str(samples), "--out", str(folder / "gates"), "--steps", "1"],
        ["eval", model, *evaluation, "--task-file", tasks, "--out", str(folder / "eval")],
    ):
        code = cli.main([*line, "--traceback"])
        if code:
            raise SystemExit(f"{line[0]}: {code}")


def main() -> None:
    """All of it."""
    folder, model_folder = map(Path, sys.argv[1:])
    logged = io.StringIO()
    logging.getLogger("transformers").addHandler(logging.StreamHandler(logged))
    text = folder / "text.txt"
    text.write_text("mia hid lamp rope coin bell . " + "the old wind moves over the quiet hill . " * 40)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", kind)
        library(folder, model_folder)
        commands(folder, model_folder, text)
    print(logged.getvalue())


if __name__ == "__main__":
    main()
