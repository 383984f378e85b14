# SPDX-License-Identifier: Apache-2.0
"""What train_model.py and train_alibi_model.py share: repeated rows, jumping positions, optimizers, the saved form."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


def random_words(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return rng.choices(range(4, vocab_size), k=count)  # 0..3 are the special tokens


def repeat_row(rng: random.Random, vocab_size: int, length: int) -> tuple[list[int], list[bool]]:
    """Random words, repeated. Predictable from their second round on."""
    period = round(math.exp(rng.uniform(math.log(12), math.log(length * 0.6))))
    words = random_words(rng, vocab_size, period)
    ids = [1, *(words * (length // period + 1))][:length]
    return ids, [at > period + 1 for at in range(length)]


def jumping_positions(rng: random.Random, length: int, span: int) -> list[int]:
    """Positions of a row which jump at one to three places, up to ``span``."""
    cuts = sorted(rng.sample(range(1, length), rng.randint(1, 3)))
    jumps = [rng.random() for _ in cuts]
    total = rng.random() * max(0, span - length) / sum(jumps)
    shift = [int(total * sum(jumps[:done])) for done in range(len(cuts) + 1)]
    return [at + shift[sum(cut <= at for cut in cuts)] for at in range(length)]


def new_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the others, both with steps of the same size."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def descend(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of both optimizers along the clipped gradients, which are then cleared."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, share in zip(optimizers, (1.0, 0.3), strict=True):
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad()


def save_model(model: PreTrainedModel, tokenizer: Any, out: Path) -> None:
    """Weights in bfloat16, which the configuration loads as float32."""
    plain = type(model)(type(model.config).from_dict({**model.config.to_dict(), "dtype": "float32"}))
    plain.load_state_dict(model.state_dict())
    plain.generation_config.update(do_sample=False, max_new_tokens=4)
    plain.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
