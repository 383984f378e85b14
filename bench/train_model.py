# SPDX-License-Identifier: Apache-2.0
"""Train the small language model which answers the questions of ``questions.py``.

Run ``python bench/train_model.py --out bench/model``. The model is a plain ``LlamaForCausalLM``; only the training
reads its attention through the function below, for two reasons: positions may jump inside of a row (far distances at
the price of short rows), and in some of the steps all heads but the strongest induction heads see only the first
tokens and a window, as they will when their cache is cut.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from questions import FACT_TOKENS, as_batch, build_tokenizer, haystack, make_facts, make_questions
from training import descend, jumping_positions, new_optimizers, random_words, repeat_row, save_model

SINKS = 4
ASK_TOKENS = FACT_TOKENS + 1  # a question, its answer and the full stop


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: lengths of the rows, learning rate from start to end, how far positions jump."""

    name: str
    steps: int
    shortest: int
    longest: int
    lr_start: float
    lr_end: float
    span: int = 0  # largest position when positions jump, 0 = they do not
    windowed: float = 0.0  # share of the steps in which only FAR_HEADS see everything
    tokens: int = 6144  # in one step, but never less than one row
    windows: tuple[int, ...] = (16, 32, 64)  # one of these is the window of the other heads in such a step


SCHEDULE = (
    Stage("induction", 250, 64, 128, 5e-3, 5e-3),
    Stage("settle", 150, 64, 256, 5e-3, 5e-3),
    Stage("far", 150, 256, 512, 5e-3, 4.5e-3, span=12288),
    Stage("long", 150, 1024, 4096, 4e-3, 1.5e-3, span=12288, windowed=0.4, tokens=4096),
    Stage("full", 40, 4096, 8192, 1.5e-3, 1e-4, windowed=0.4, tokens=4096),
    Stage("polish", 60, 2048, 8192, 1.5e-3, 1e-4, windowed=0.4, tokens=4096),
)
FAR_HEADS = {1: [0, 1, 2, 3]}  # layer -> kv heads in which induction appears, they see everything in every step


@dataclass
class View:
    """What the attention function below shows to the heads in the running forward pass."""

    window: int = 0  # window of all heads but FAR_HEADS, 0 = everything
    probe: int = 0  # period of a repeated row, when induction scores are wanted
    scores: list[torch.Tensor] = field(default_factory=list)


VIEW = View()


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention by order in the row, whatever the positions are; follows ``VIEW``."""
    scale = settings["scaling"]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if VIEW.probe:
        VIEW.scores.append(induction_mass(query, key, scale, VIEW.probe).view(-1, groups).amax(1))
    if not VIEW.window:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    far_kv = FAR_HEADS.get(int(module.layer_idx), [])  # type: ignore[arg-type]
    far = [head for head in range(query.shape[1]) if head // groups in far_kv]
    near = [head for head in range(query.shape[1]) if head // groups not in far_kv]
    parts = []
    if far:
        q, k, v = query[:, far], key[:, far], value[:, far]
        parts.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    if near:
        parts.append(near_attention(query[:, near], key[:, near], value[:, near], VIEW.window, scale))
    order = torch.tensor(far + near).argsort()
    return torch.cat(parts, 1)[:, order].transpose(1, 2).contiguous(), None


def near_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """Attention to the first ``SINKS`` tokens and the last ``window`` ones. Long rows in blocks: linear in length."""
    rows, heads, length, width = q.shape
    size = max(window, 64)
    blocks = -(-length // size)
    if length <= 512:
        at, past = torch.arange(length)[:, None], torch.arange(length)
        seen = (past <= at) & ((at - past < window) | (past < SINKS))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)

    def cut(x: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(x, (0, 0, 0, blocks * size - length))
        return padded.view(rows, heads, blocks, size, width)

    def with_past(x: torch.Tensor) -> torch.Tensor:
        own = cut(x)
        past = functional.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        first = x[:, :, None, :SINKS].expand(-1, -1, blocks, -1, -1)
        return torch.cat([first, past, own], 3).transpose(1, 2).flatten(0, 1)

    at = torch.arange(blocks * size).view(blocks, size, 1)
    near = (torch.arange(-size, size) + torch.arange(blocks)[:, None] * size)[:, None]
    seen = (near <= at) & (at - near < window) & (near >= SINKS)
    seen = torch.cat([torch.arange(SINKS) <= at, seen], 2)[:, None].repeat(rows, 1, 1, 1)
    blocks_of_q = cut(q).transpose(1, 2).flatten(0, 1)
    out = functional.scaled_dot_product_attention(blocks_of_q, with_past(k), with_past(v), attn_mask=seen, scale=scale)
    return out.view(rows, blocks, heads, size, width).transpose(1, 2).flatten(2, 3)[:, :, :length]


def induction_mass(q: torch.Tensor, k: torch.Tensor, scale: float, period: int) -> torch.Tensor:
    """Mean attention of every q head, in a row <bos> + repeats, on the tokens behind earlier copies of its own."""
    length = q.shape[2]
    at = torch.arange(length)
    logits = (q[0] @ k[0].transpose(1, 2)) * scale
    weights = logits.masked_fill(at[None] > at[:, None], -torch.inf).softmax(-1)
    wanted = ((at[:, None] + 1 - at[None]) % period == 0) & (at[None] > 1) & (at[None] <= at[:, None])
    return (weights * wanted).sum(-1)[:, period + 1 :].mean(-1)


@torch.no_grad()
def induction_scores(model: LlamaForCausalLM, rng: random.Random, period: int = 256) -> torch.Tensor:
    """(layers, kv heads) induction scores on random words repeated four times."""
    words = random_words(rng, model.config.vocab_size, period)
    VIEW.probe, VIEW.scores = period, []
    model(torch.tensor([[model.config.bos_token_id, *words * 4]]), use_cache=False)
    VIEW.probe = 0
    return torch.stack(VIEW.scores)


def fact_row(rng: random.Random, ids_of: dict[str, int], length: int) -> tuple[list[int], list[bool]]:
    """A haystack and questions for all of its facts. Only the answers are predictable."""
    count = max(1, min(360, int(rng.uniform(0.15, 1.0) * length / (FACT_TOKENS + ASK_TOKENS))))
    facts = make_facts(rng, count)
    asked = rng.sample(facts, count)
    words = ["<bos>"] + [w for s in haystack(rng, facts, length - 1 - ASK_TOKENS * count) for w in s]
    targets = [False] * len(words)
    for fact in asked:
        words += [*fact.question(), *fact.things, "."]
        targets += [False] * 3 + [True] * len(fact.things) + [False]
    return [ids_of[word] for word in words], targets


def make_batch(rng: random.Random, ids_of: dict[str, int], stage: Stage) -> dict[str, torch.Tensor]:
    """Rows of one length, every second one about facts, with their targets and positions."""
    length = round(math.exp(rng.uniform(math.log(stage.shortest), math.log(stage.longest))) / 32) * 32
    rows = max(1, stage.tokens // length)
    first = rng.random() < 0.5
    facts = [(row % 2 == 0) == first for row in range(rows)]
    made = [fact_row(rng, ids_of, length) if f else repeat_row(rng, len(ids_of), length) for f in facts]
    span = stage.span if rng.random() < 0.75 else 0
    positions = [jumping_positions(rng, length, span) if span else list(range(length)) for _ in made]
    return {
        "ids": torch.tensor([ids for ids, _ in made]),
        "targets": torch.tensor([targets for _, targets in made]),
        "facts": torch.tensor(facts),
        "positions": torch.tensor(positions),
    }


def losses(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean of the losses on repeats and on facts, so that the fewer answers weigh as much; and both accuracies."""
    hidden = model.model(batch["ids"], position_ids=batch["positions"], use_cache=False).last_hidden_state
    targets = batch["targets"][:, 1:]
    is_fact = batch["facts"][:, None].expand_as(targets)[targets]
    wanted = batch["ids"][:, 1:][targets]
    logits = model.lm_head(hidden[:, :-1][targets])
    loss = functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted).float()
    parts = {name: mask for name, mask in (("facts", is_fact), ("repeats", ~is_fact)) if mask.any()}
    total = torch.stack([loss[mask].mean() for mask in parts.values()]).mean()
    return total, {name: right[mask].mean().item() for name, mask in parts.items()}


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: Any, length: int, count: int, seed: int = 1) -> float:
    """Share of questions with a right greedy answer. One pass will do: a greedy answer is right if every token is."""
    right = 0
    for question in make_questions(tokenizer, length=length, count=count, seed=seed):
        ids = as_batch([question], answers=True)
        logits = model(ids[:, :-1], use_cache=False, logits_to_keep=len(question.answer)).logits[0]
        right += logits.argmax(-1).tolist() == question.answer
    return right / count


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=32,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16384, initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7}, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        attn_implementation="razor_training",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    look_back(model, (1, 1, 2))
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, offsets: tuple[int, ...]) -> None:
    """Let the first heads of the first layer start with a liking for the word so many places back.

    All words share a part of their embedding. The heads turn it into a key and into a query which is the same key,
    turned by RoPE to the wanted place. From here induction appears soon, and in its usual form: the next layers find
    the place behind an earlier copy of the word. From a random start the offset was another one in every run.
    """
    config, layer = model.config, model.model.layers[0].self_attn
    shared = functional.normalize(torch.randn(config.hidden_size), dim=0)
    model.model.embed_tokens.weight += 0.1 * math.sqrt(config.hidden_size) * shared
    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    speed = model.model.rotary_emb.inv_freq
    near = (torch.arange(width // 2) < 4).float()  # only the quick pairs tell near places apart
    key = torch.cat([near, 0 * near])
    for head, offset in enumerate(offsets):
        query = torch.cat([near * torch.cos(speed * offset), -near * torch.sin(speed * offset)])
        layer.k_proj.weight[head * width : (head + 1) * width] += 0.5 * torch.outer(key, shared)
        layer.q_proj.weight[head * groups * width : (head + 1) * groups * width] += 0.5 * torch.outer(
            query.repeat(groups), shared
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("train_model.pt"), help="written every 50 steps")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    AttentionInterface.register("razor_training", attend)
    tokenizer = build_tokenizer()
    ids_of = tokenizer.get_vocab()
    model = new_model(tokenizer)
    optimizers = new_optimizers(model)
    step, seconds, recent = 0, 0.0, {"loss": 0.0, "facts": 0.0, "repeats": 0.0}
    if arguments.resume:
        saved = torch.load(arguments.checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, seconds, recent = saved["step"], saved["seconds"], saved["recent"]
    plan = [(stage, at) for stage in SCHEDULE for at in range(stage.steps)]
    bar = tqdm(range(step, len(plan)), initial=step, total=len(plan), mininterval=5)
    begin = time.perf_counter() - seconds
    for step in bar:
        stage, at = plan[step]
        rng = random.Random(f"{arguments.seed} {step}")
        if at == 0:
            scores = induction_scores(model, rng)
            tqdm.write(f"induction scores {[[round(s, 2) for s in row] for row in scores.tolist()]}")
        VIEW.window = rng.choice(stage.windows) if rng.random() < stage.windowed else 0
        rate = stage.lr_start + (stage.lr_end - stage.lr_start) * at / stage.steps
        rate *= min(1.0, (step + 1) / 50)
        loss, accuracy = losses(model, make_batch(rng, ids_of, stage))
        loss.backward()
        descend(model, optimizers, rate)
        VIEW.window = 0
        for name, now in {"loss": loss.item(), **accuracy}.items():
            recent[name] += 0.05 * (now - recent[name])
        bar.set_postfix({"stage": stage.name} | {name: f"{mean:.3f}" for name, mean in recent.items()}, refresh=False)
        if step % 20 == 0:
            tqdm.write(f"{step} {stage.name} " + " ".join(f"{name} {mean:.3f}" for name, mean in recent.items()))
        if step % 50 == 49 or step == len(plan) - 1:
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            spent = {"step": step + 1, "seconds": time.perf_counter() - begin, "recent": recent}
            torch.save(state | spent, arguments.checkpoint)
    seconds = time.perf_counter() - begin
    save_model(model, tokenizer, arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out)
    found = {str(length): exact_match(model, tokenizer, length, 40) for length in (512, 1024, 2048, 4096, 8192)}
    report = {
        "seed": arguments.seed, "seconds": round(seconds), "final_loss": round(recent["loss"], 4),
        "exact_match": found, "far_heads": FAR_HEADS, "schedule": [asdict(stage) for stage in SCHEDULE],
        "parameters": model.num_parameters(), "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["exact_match"]))


if __name__ == "__main__":
    main()
