# SPDX-License-Identifier: Apache-2.0
"""Several processes, several devices: tensor parallelism with two ranks, and layers that accelerate keeps on disk."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from razor_attention.bench import scale
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import parallel_worker as worker
import tiny_models as tiny
from razor_attention import FULL, Plan, attach, find_heads
from razor_attention.hf.names import output_cache

RANKS = range(worker.WORLD_SIZE)
SECONDS = 300  # then a rank that waits for another one is ended
CALLS_ALL_REDUCE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)  # before, DTensor does
UNEVEN = "ValueError: tp_size: expected a divisor of {} kv heads, got 2; transformers would cut a head"
REFUSALS = {
    "3 kv heads": UNEVEN.format(3),
    "1 kv head": UNEVEN.format(1),
    "find_heads": UNEVEN.format(3),
    "a plan that is cut already": "ValueError: plan: expected 2 layers x 4 kv heads like the model, got 2 x 2",
    "gates": "NotImplementedError: model: expected all kv heads in one process to train their gates, got a "
    "tensor-parallel model; train without torchrun: a plan made from the gates is cut for every rank",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("parallel")
    worker.make(made)
    return made


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of the ranks wrote down."""
    if not hasattr(DistributedConfig, "tp_plan"):
        pytest.skip("this transformers does not say how a model is cut")
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(len(RANKS)), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in RANKS]
    started = []
    with ExitStack() as ending:
        for rank, log in zip(RANKS, logs, strict=True):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            output = ending.enter_context(log.open("w"))
            command = [sys.executable, worker.__file__, str(folder)]
            process = subprocess.Popen(command, env=os.environ | torchrun | own, stdout=output, stderr=output)
            ending.callback(process.wait)
            ending.callback(process.kill)
            started.append(process)
        codes = [process.wait(SECONDS) for process in started]
    assert codes == [0] * len(RANKS), "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in RANKS]


@pytest.fixture(scope="module")
def alone(folder):
    """The results of one process with whole models."""
    return worker.results(worker.loader(folder, parallel=False), folder)


def promised(plan, case):
    """Bytes after the answers; the last token is never fed."""
    _, _, options = worker.CASES[case]
    given = plan.resolve(max(worker.LENGTHS))
    dtype = options.get("kv_dtype", torch.float32)
    lengths = [length + worker.NEW_TOKENS - 1 for length in worker.LENGTHS]
    return sum(given.kv_bytes(length, head_dim=tiny.SIZES["head_dim"], dtype=dtype) for length in lengths)


@pytest.mark.parametrize("case", worker.CASES)
def test_ranks_answer_like_one_process_with_their_share_of_its_bytes(ranks, alone, case):
    answers, held = alone[case]
    plan = worker.CASES[case][1]
    assert held == promised(plan, case)
    for rank, wrote in enumerate(ranks):
        got, bytes_here = wrote["results"][case]
        assert torch.equal(got, answers)
        assert bytes_here == promised(plan if case == "gathered keys" else plan.shard(rank, len(RANKS)), case)
    if case not in ("gathered keys", "full"):  # the plans tell the ranks apart
        assert len({wrote["results"][case][1] for wrote in ranks}) == len(RANKS)


@pytest.mark.parametrize("what", ["beams", "conversation"])
def test_whatever_generates_is_equal_on_every_rank(ranks, alone, what):
    assert all(torch.equal(wrote["results"][what], alone[what]) for wrote in ranks)


def test_a_full_plan_is_stock_generation(ranks, alone):
    for wrote in ranks:
        assert torch.equal(wrote["results"]["full"][0], wrote["results"]["stock"])
        assert torch.equal(wrote["results"]["stock"], alone["stock"])
    assert not torch.equal(alone["mixed"][0], alone["stock"])  # or the cases would prove nothing


def test_every_rank_gets_the_scores_and_masses_of_all_heads(ranks, alone):
    for wrote in ranks:
        for got, whole in zip(wrote["results"]["scores"], alone["scores"], strict=True):
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(wrote["results"]["mass"], alone["mass"], rtol=0, atol=1e-5)
    assert len(alone["scores"][1].unique()) == alone["scores"][1].numel()  # no head passes for another


def test_the_command_runs_on_every_rank_and_prints_on_the_first(ranks, alone):
    first, second = (wrote["results"]["printed"] for wrote in ranks)
    assert second == ""

    def answers(text):
        return [line for line in text.splitlines() if line and "of KV" not in line]

    assert answers(first) == answers(alone["printed"])
    full, held = (re.search(rf"{name}: (\S+) KB of KV(.*?)[,;]", first) for name in ("full cache", "razor"))
    assert full[2].endswith("on the first process")
    assert held[2].endswith("on the first process")
    whole = re.search(r"full cache: (\S+) KB", alone["printed"])
    assert float(full[1]) == pytest.approx(float(whole[1]) / len(RANKS), rel=0.01)


def test_what_ranks_refuse(ranks):
    assert [wrote["refusals"] for wrote in ranks] == [REFUSALS] * len(RANKS)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_what_stands_on_paper_is_what_ranks_hold(ranks, monkeypatch, kv):
    shape = tiny.SIZES | worker.SHAPE
    model = scale.Model(
        shape["num_hidden_layers"],
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape["head_dim"],
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["vocab_size"],
    )
    monkeypatch.setitem(scale.MODELS, "tiny", model)
    lengths = [length + worker.NEW_TOKENS - 1 for length in worker.LENGTHS]
    rows = [scale.scale("tiny", "mixed", worker.MIXED, n, len(RANKS), capacity=1e9, kv_dtype=kv) for n in lengths]
    held = [wrote["results"][kv][1] for wrote in ranks]
    assert sum(row.kv_bytes for row in rows) == max(held)
    heads = sum(scale.head_bytes(worker.MIXED, n, model.head_dim, kv) for n in lengths)
    cut = heads.view(model.num_layers, len(RANKS), -1).sum(2)
    assert cut.sum(0).tolist() == held
    assert scale.imbalances(cut, 1)[0] == pytest.approx(max(held) / (sum(held) / len(RANKS)))
    for wrote in ranks:  # in float32, twice the bytes of bf16; norms are on every rank
        assert wrote["measured"]["weights"] == pytest.approx(2 * rows[0].weight_bytes, rel=0.02)
        if CALLS_ALL_REDUCE:
            assert wrote["measured"]["reduced"] == 2 * rows[0].reduced_bytes


# --- plans


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_shards_are_the_plan_in_order_and_their_bytes_its_bytes(world_size, heads, layers, data):
    tables = [
        data.draw(st.lists(st.lists(values, min_size=world_size * heads, max_size=world_size * heads), min_size=layers,
        max_size=layers)) for values in (st.integers(0, 9), st.sampled_from([0, 5, 300, FULL]), st.booleans())
    ]  # fmt: skip
    plan = Plan(*tables, window_fraction=0.1, provenance={"model": "m"})
    shards = [plan.shard(rank, world_size) for rank in range(world_size)]
    for name in ("sink_size", "window_size", "compensate"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards], 1), getattr(plan, name))
    assert all((shard.window_fraction, shard.provenance) == (0.1, {"model": "m"}) for shard in shards)
    sizes = {"head_dim": 32, "dtype": torch.bfloat16}
    held = [shard.kv_bytes(1000, **sizes) for shard in shards]
    assert sum(held) == plan.kv_bytes(1000, **sizes)
    expected = max(held) / (sum(held) / world_size) if any(held) else 1
    assert plan.imbalance(world_size, 1000, **sizes) == pytest.approx(expected)


def test_imbalance_of_known_plans():
    sizes = {"head_dim": 64, "dtype": torch.bfloat16}
    one_sided = Plan.from_heads({0: [0, 1], 1: [0]}, num_layers=2, num_kv_heads=4, sink_size=0, min_window=1)
    assert [Plan.full(2, 4).imbalance(n, 640, **sizes) for n in (1, 2, 4)] == [1, 1, 1]
    assert Plan.full(2, 4).imbalance(4, 0, **sizes) == 1  # nobody keeps anything yet
    rule = Plan(one_sided.sink_size, one_sided.window_size, torch.zeros_like(one_sided.compensate))
    pages = [pytest.approx(31 * 2 / 35), pytest.approx(20 * 4 / 35)]  # 10 of each full head, 1 of the five others
    assert [rule.imbalance(n, 640, **sizes) for n in (1, 2, 4)] == [1, *pages]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("shard", (0, 3), "world_size: expected a divisor of 8 kv heads, got 3"),
        ("shard", (0, 16), "world_size: expected a divisor of 8 kv heads, got 16"),
        ("shard", (4, 4), "rank: expected an integer <= 3, got 4"),
        ("shard", (-1, 4), "rank: expected an integer >= 0, got -1"),
        ("shard", (0, 0), "world_size: expected an integer >= 1, got 0"),
        ("imbalance", (3, 100), "world_size: expected a divisor of 8 kv heads, got 3"),
    ],
)
def test_parts_that_do_not_exist(method, arguments, message):
    sizes = {"head_dim": 64, "dtype": torch.bfloat16} if method == "imbalance" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(Plan.full(2, 8), method)(*arguments, **sizes)


# --- device maps

LAYERS = ("model.layers.0", "model.layers.1")
DISK = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *LAYERS), "disk")
MAPS = {
    "a layer on disk": {"device_map": DISK | {LAYERS[0]: "cpu"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "220KB"}},
    "two devices": {"device_map": dict.fromkeys(DISK, "cpu") | {LAYERS[1]: 0}},
}


@pytest.mark.parametrize("how", [*list(MAPS)[:-1], pytest.param("two devices", marks=pytest.mark.cuda)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of accelerate, about weights on the meta device
def test_layers_on_several_devices(folder, tmp_path, how):
    whole = worker.loader(folder, parallel=False)("llama")
    spread = AutoModelForCausalLM.from_pretrained(folder / "llama", offload_folder=tmp_path, **MAPS[how])
    devices = set(map(str, spread.hf_device_map.values()))
    assert devices == ({"cpu", "0"} if how == "two devices" else {"cpu", "disk"})

    ids, mask = tiny.prompts(*worker.LENGTHS)
    options = {"attention_mask": mask, "max_new_tokens": worker.NEW_TOKENS, "do_sample": False}
    with attach(spread, worker.MIXED):
        out = spread.generate(ids, return_dict_in_generate=True, **options)
    with attach(whole, worker.MIXED):
        assert torch.equal(out.sequences, whole.generate(ids, **options))
    assert output_cache(out).nbytes == promised(worker.MIXED, "mixed")
    where = [layer.cache.key_pages.device.type for layer in output_cache(out).layers]
    assert where == ["cpu", "cuda" if how == "two devices" else "cpu"]

    scores, expected = (find_heads(one, worker.Tokenizer(), period=40, progress=False) for one in (spread, whole))
    torch.testing.assert_close(scores.echo, expected.echo, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.induction, expected.induction, rtol=0, atol=1e-6)


def test_an_alibi_model_on_disk(folder, tmp_path):
    whole = worker.loader(folder, parallel=False)("bloom")
    parts = [name for name, module in whole.named_modules() if name and not [*module.children()]]
    places = {name: "disk" if ".h.1." in name else "cpu" for name in parts}
    spread = AutoModelForCausalLM.from_pretrained(folder / "bloom", offload_folder=tmp_path, device_map=places)
    ids, mask = tiny.prompts(*worker.LENGTHS)
    answers = []
    for model in (whole, spread):
        with attach(model, worker.WINDOWS):
            answers.append(tiny.answer(model, ids, mask))
    assert torch.equal(*answers)
