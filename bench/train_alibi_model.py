# SPDX-License-Identifier: Apache-2.0
"""Train the small ALiBi model which continues the texts of ``questions.py``.

Run ``python bench/train_alibi_model.py --out bench/alibi_model``. The model is a plain ``BloomForCausalLM``, attention
included. The training adds two things: positions may jump inside of a row (far distances at the price of short rows),
and looking far costs, so that a head only does it where it pays.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from tqdm import tqdm
from transformers import BloomConfig, BloomForCausalLM

from questions import asked_tokens, build_tokenizer, make_text
from training import descend, jumping_positions, new_optimizers, repeat_row, save_model

NEAR = 16  # tokens; attention within this distance costs little
EVALUATION_SEED = 1  # of the texts for the report; training texts have other seeds


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: lengths of the rows, learning rate from start to end, what the rows and the loss are."""

    name: str
    steps: int
    shortest: int
    longest: int
    lr_start: float
    lr_end: float
    span: int = 0  # largest position when positions jump, 0 = they do not
    repeats: float = 0.5  # share of the rows which are repeated random words
    others: float = 0.2  # weight of the tokens which are not answers
    reach: float = 0.0  # weight of the cost of looking far
    tokens: int = 4096  # in one step, but never less than one row


SCHEDULE = (
    Stage("induction", 300, 64, 128, 5e-3, 5e-3, tokens=6144),
    Stage("far", 180, 128, 512, 5e-3, 3e-3, span=4096, repeats=0.3, reach=0.03),
    Stage("long", 80, 512, 1536, 3e-3, 2e-4, span=6144, repeats=0.15, others=0.5, reach=0.05),
)


def make_batch(rng: random.Random, tokenizer: Any, stage: Stage) -> dict[str, torch.Tensor]:
    """Rows of one length, texts and repeats, with the tokens which can be read from afar, and positions."""
    length = round(math.exp(rng.uniform(math.log(stage.shortest), math.log(stage.longest))) / 32) * 32
    rows = max(1, stage.tokens // length)
    texts = [row == 0 or rng.random() >= stage.repeats for row in range(rows)]
    made = [text_row(rng, tokenizer, length) if t else repeat_row(rng, len(tokenizer), length) for t in texts]
    jump = [stage.span > 0 and rng.random() < 0.6 for _ in made]
    positions = [jumping_positions(rng, length, stage.span) if j else list(range(length)) for j in jump]
    return {
        "ids": torch.tensor([ids for ids, _ in made]),
        "targets": torch.tensor([targets for _, targets in made]),
        "texts": torch.tensor(texts),
        "positions": torch.tensor(positions),
    }


def text_row(rng: random.Random, tokenizer: Any, length: int) -> tuple[list[int], list[bool]]:
    ids = make_text(tokenizer, length, rng.getrandbits(62))
    asked = {token.position for token in asked_tokens(tokenizer, ids)}
    return ids, [at in asked for at in range(length)]


def losses(
    model: BloomForCausalLM, batch: dict[str, torch.Tensor], stage: Stage
) -> tuple[torch.Tensor, dict[str, float]]:
    """Answers, half as much the repeats, the other tokens of texts, and the reach; with the accuracies."""
    ids, far = batch["ids"], stage.reach > 0
    place(model, batch["positions"])
    seen = model.transformer(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=far)
    logits, wanted = model.lm_head(seen.last_hidden_state[:, :-1]), ids[:, 1:]
    loss = functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    right = (logits.argmax(-1) == wanted).float()
    target, text = batch["targets"][:, 1:], batch["texts"][:, None]
    masks = {
        "answers": (target & text, 1.0),
        "repeats": (target & ~text, 0.5),
        "others": (~target & text, stage.others),
    }
    parts = {name: (mask, weight) for name, (mask, weight) in masks.items() if mask.any()}
    total = torch.stack([weight * loss[mask].mean() for mask, weight in parts.values()]).sum()
    measured = {name: right[mask].mean().item() for name, (mask, _) in parts.items()}
    if far:
        cost = reach(seen.attentions, batch["positions"]).sum()
        total = total + stage.reach * cost
        measured["reach"] = cost.item()
    return total, {"loss": total.item(), **measured}


def place(model: BloomForCausalLM, positions: torch.Tensor) -> None:
    """Let the ALiBi bias of the next forward pass follow these (rows, tokens) positions."""
    one = torch.ones(1, 2, dtype=torch.long)

    def alibi(_: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        slopes = type(model.transformer).build_alibi_tensor(model.transformer, one, num_heads, torch.float32)[:, 0, 1]
        return (slopes[:, None, None] * positions[:, None, None]).flatten(0, 1).to(dtype)

    model.transformer.build_alibi_tensor = alibi


def reach(attentions: tuple[torch.Tensor, ...], positions: torch.Tensor) -> torch.Tensor:
    """(layers, heads) mean over all queries of the attended log2(1 + distance / NEAR)."""
    distance = (positions[:, :, None] - positions[:, None]).clamp(min=0)
    cost = torch.log2(1 + distance / NEAR)[:, None]
    return torch.stack([(weights * cost).sum(-1).mean((0, 2)) for weights in attentions])


@torch.no_grad()
def quality(model: BloomForCausalLM, tokenizer: Any, length: int, seed: int) -> dict[str, float]:
    """Perplexity of one text, and the share of right tokens among its answers."""
    ids = make_text(tokenizer, length, seed)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    loss = functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    asked = torch.tensor([token.position for token in asked_tokens(tokenizer, ids)])
    right = (logits[asked - 1].argmax(-1) == torch.tensor(ids)[asked]).float().mean().item()
    return {"perplexity": round(math.exp(loss), 3), "answers": round(right, 4)}


def new_model(tokenizer: Any) -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=128, n_layer=3, n_head=8, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = BloomForCausalLM(config)
    look_around(model)
    return model


@torch.no_grad()
def look_around(model: BloomForCausalLM) -> None:
    """Let the steepest head of the first layer start with a dislike for the query's own word.

    ALiBi alone cannot look one token back, since the own token is always nearest. With queries which are the negative
    of the keys a token avoids itself and sees those just before, which is what the next layers match: the words before
    the earlier copy with the words at the end of the text.
    """
    config, layer = model.config, model.transformer.h[0].self_attention
    width = config.hidden_size // config.n_head
    query, key, _ = layer.query_key_value.weight.view(config.n_head, 3, width, config.hidden_size)[0]
    some = functional.normalize(torch.randn(width, config.hidden_size), dim=1)
    query.copy_(-1.5 * some)
    key.copy_(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    optimizers = new_optimizers(model)
    recent: dict[str, float] = {}
    plan = [(stage, at) for stage in SCHEDULE for at in range(stage.steps)]
    bar = tqdm(plan, mininterval=5)
    begin = time.perf_counter()
    for step, (stage, at) in enumerate(bar):
        rng = random.Random(f"{arguments.seed} {step}")
        rate = stage.lr_start + (stage.lr_end - stage.lr_start) * at / stage.steps
        loss, measured = losses(model, make_batch(rng, tokenizer, stage), stage)
        loss.backward()
        descend(model, optimizers, rate * min(1.0, (step + 1) / 50))
        for name, now in measured.items():
            recent[name] = recent.get(name, now) + 0.05 * (now - recent.get(name, now))
        bar.set_postfix({"stage": stage.name} | {name: f"{mean:.3f}" for name, mean in recent.items()}, refresh=False)
        if step % 20 == 0 or step == len(plan) - 1:
            tqdm.write(f"{step} {stage.name} " + " ".join(f"{name} {mean:.3f}" for name, mean in recent.items()))
        if at == stage.steps - 1:
            save_model(model, tokenizer, arguments.out)
    seconds = time.perf_counter() - begin
    model = BloomForCausalLM.from_pretrained(arguments.out)
    found = {str(length): quality(model, tokenizer, length, EVALUATION_SEED) for length in (512, 1024, 2048, 4096)}
    report = {
        "seed": arguments.seed, "seconds": round(seconds), "recent": {k: round(v, 4) for k, v in recent.items()},
        "text": found, "schedule": [asdict(stage) for stage in SCHEDULE], "parameters": model.num_parameters(),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["text"]))


if __name__ == "__main__":
    main()
