# SPDX-License-Identifier: Apache-2.0
"""vLLM with a plan gives the tokens of transformers with that plan, in the blocks that the plan needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from razor_attention import Plan, attach
from razor_attention.hf.models import geometry
from razor_attention.vllm.layout import Layout
from tiny_models import EOS, FULL_PLAN, MIXED, PAD, VOCABULARY, alibi_model, shared_model, tiny_model

NEW_TOKENS = 24
LENGTHS = (5, 200, 33, 90, 16, 150, 64, 7, 120, 41)  # more requests than max_num_seqs


def make_prompts(lengths: Sequence[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def engine_answers(engine: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    from vllm import SamplingParams

    never = {PAD: -100.0, EOS: -100.0}  # as in the tiny models' generation_config
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logit_bias=never)
    out = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


def transformers_answers(
    model: PreTrainedModel, plan: Plan, prompts: list[list[int]], new_tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """Each prompt alone, uncut."""
    found = []
    with attach(model, plan, prefill="streaming"):
        for ids in prompts:
            lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            out = model.generate(
                torch.tensor([ids]), do_sample=False, suppress_tokens=[PAD, EOS], pad_token_id=PAD, **lengths
            )
            found.append(out[0, len(ids) :].tolist())
    return found


def scheduler(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler


def blocks_held(engine: Any) -> dict[str, int]:
    """Blocks of each request, by vLLM's own books."""
    (manager,) = scheduler(engine).kv_cache_manager.coordinator.single_type_managers
    return {request: len(blocks) for request, blocks in manager.req_to_blocks.items()}


def free_blocks(engine: Any) -> int:
    return int(scheduler(engine).kv_cache_manager.block_pool.get_num_free_blocks())


# MIXED has every kind of head. Chunks of 48 tokens cut prompts inside windows and inside blocks.
@pytest.mark.parametrize(
    ("family", "chunk", "sizes"),
    [
        ("llama", 48, {}),
        ("llama", 2048, {}),
        ("qwen2", 48, {"hidden_size": 96}),  # vLLM takes its head_dim to be hidden_size / heads
        ("qwen3", 48, {}),
        ("mistral", 48, {}),
    ],
)
def test_tokens_are_those_of_transformers(make_engine: Any, family: str, chunk: int, sizes: dict[str, int]) -> None:
    model, prompts = tiny_model(family, **sizes), make_prompts(LENGTHS)
    engine = make_engine(model, MIXED, max_num_batched_tokens=chunk)
    wanted = transformers_answers(model, MIXED, prompts)
    assert engine_answers(engine, prompts) == wanted
    assert wanted != transformers_answers(model, FULL_PLAN, prompts)  # the plan matters here
    assert engine_answers(engine, prompts) == wanted  # in blocks that others have used


def test_alibi(make_engine: Any) -> None:
    model, prompts = alibi_model("bloom", tie_word_embeddings=True), make_prompts(LENGTHS)  # vLLM loads no others
    with torch.no_grad():  # or a token's own embedding decides what follows it
        model.transformer.word_embeddings_layernorm.weight[::2] *= -1
    sizes = geometry(model.config)
    plan = Plan.from_windows([5, 9, 17, 30, 2**31 - 1, 12, 40, 3], num_layers=2, num_kv_heads=sizes.num_kv_heads)
    wanted = transformers_answers(model, plan, prompts)
    assert engine_answers(make_engine(model, plan, max_num_batched_tokens=64), prompts) == wanted
    assert wanted != transformers_answers(model, Plan.full(2, sizes.num_kv_heads), prompts)
    assert max(map(len, map(set, wanted))) > 5


def test_two_ranks_with_different_needs(make_engine: Any) -> None:
    """Each rank has its kv heads; the one with the full head decides how many blocks a request takes."""
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    plan = Plan([[2, 0], [4, 0]], [[20, 2**31 - 1], [9, 30]], [[True, False], [True, False]])
    prompts = make_prompts(LENGTHS)
    engine = make_engine(model, plan, max_num_batched_tokens=64, tensor_parallel_size=2)
    assert engine_answers(engine, prompts) == transformers_answers(model, plan, prompts)


def test_compiled(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # dynamo without inductor, which takes minutes
    model, prompts = shared_model("llama"), make_prompts(LENGTHS)
    engine = make_engine(model, MIXED, max_num_batched_tokens=64, enforce_eager=False)
    assert engine_answers(engine, prompts) == transformers_answers(model, MIXED, prompts)


def test_preempted_requests_begin_again(make_engine: Any) -> None:
    model, prompts = shared_model("llama"), make_prompts([60] * 8)
    layout = Layout(MIXED, block_size=16, head_dim=16, dtype=torch.float32)
    # Room for all prompts with a few tokens, not for all answers.
    room = 8 * layout.growth().blocks(64) + 1
    engine = make_engine(model, MIXED, num_gpu_blocks_override=room, max_model_len=256, disable_log_stats=False)
    assert 8 * layout.growth().blocks(160) > room
    assert engine_answers(engine, prompts, 100) == transformers_answers(model, MIXED, prompts, 100)
    (preempted,) = (metric for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preempted.value > 0


def test_blocks_are_what_the_plan_needs(make_engine: Any) -> None:
    from vllm import SamplingParams

    model, plan = shared_model("llama"), Plan([[0, 4, 4]] * 2, [[2**31 - 1, 28, 60]] * 2, [[False, True, True]] * 2)
    engine = make_engine(model, plan, max_num_batched_tokens=64)
    growth = Layout(plan, block_size=16, head_dim=16, dtype=torch.float32).growth()
    before, seen = free_blocks(engine), 0
    core = engine.llm_engine
    for number, ids in enumerate(make_prompts([300, 40, 130])):
        sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        core.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    while core.has_unfinished_requests():
        core.step()
        held = blocks_held(engine)
        requests = {request.request_id: request for request in scheduler(engine).running}
        for request_id, request in requests.items():
            # The last sampled token is not in the cache yet.
            assert held[request_id] == growth.blocks(request.num_computed_tokens)
        assert free_blocks(engine) == before - sum(held.values())
        seen = max(seen, len(requests))
    assert seen == 3
    assert free_blocks(engine) == before
    # 2 full heads grow, the others have had all they ever need: 2 x 2 and 2 x 4 blocks, and one of sums.
    assert growth.blocks(1600) == 1 + 2 * 100 + 2 * 2 + 2 * 4


def test_prefix_caching_finds_nothing(make_engine: Any) -> None:
    model, (prompt,) = shared_model("llama"), make_prompts([200])
    engine = make_engine(model, MIXED, enable_prefix_caching=True)
    first, again = (engine_answers(engine, [prompt]) for _ in range(2))
    assert first == again == transformers_answers(model, MIXED, [prompt])
    from vllm import SamplingParams

    (out,) = engine.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert not out.num_cached_tokens


def test_bfloat16_runs_in_half_the_bytes(make_engine: Any) -> None:
    engine = make_engine(shared_model("llama", torch.bfloat16), MIXED, dtype="bfloat16")
    answers = engine_answers(engine, make_prompts(LENGTHS))
    assert [len(one) for one in answers] == [NEW_TOKENS] * len(LENGTHS)
    (group,) = scheduler(engine).kv_cache_config.kv_cache_groups
    assert group.kv_cache_spec.page_size_bytes == 16 * 2 * 16 * 2


def test_the_shipped_model(make_engine: Any) -> None:
    """The demo's plan and questions, which only full heads can answer."""
    from razor_attention.bench import questions
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(questions.__file__).parent / "model"
    plan = Plan.from_heads(
        {1: [0, 1, 2]}, num_layers=4, num_kv_heads=4, sink_size=4, min_window=64, window_fraction=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        q.ids for length in (700, 1500) for q in questions.make_questions(tokenizer, length=length, count=3, seed=1)
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = make_engine(folder, plan, max_num_batched_tokens=256, block_size=32)
    assert engine_answers(engine, prompts, 16) == transformers_answers(model, plan, prompts, 16)
