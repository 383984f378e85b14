# SPDX-License-Identifier: Apache-2.0
"""The benches of quantised caches: their codes and rows are what they say, answers are compared in pairs."""

import csv

import pytest
import torch
from razor_attention.bench import quantised, quantised_answers
from razor_attention.bench.questions import build_tokenizer

from razor_attention import RazorCache, attach
from razor_attention.hf.models import load_model
from razor_attention.hf.names import CACHE

ROWS = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_words_of_16_are_the_packages_int4():
    mine, real = quantised.words(16), quantised.package(torch.uint8)
    assert torch.equal(mine.read_back(ROWS), real.read_back(ROWS))
    assert mine.nbytes(128) == real.nbytes(128) == 80


@pytest.mark.parametrize(
    ("code", "step", "nbytes"),
    [
        (quantised.halves(32), 0.0665, 80),
        (quantised.words(8), 0.075, 96),
        (quantised.words(32), 0.075, 72),
        (quantised.by_channel(50), 0.0665, 64 + 4 * 128 / 50),
    ],
)
def test_no_code_is_off_by_more_than_half_a_step(code, step, nbytes):
    """A step is a fifteenth of the largest span, of words at most 9/8 of it."""
    back = code.read_back(ROWS)
    span = ROWS.amax() - ROWS.amin()
    assert (back - ROWS).abs().max() <= step / 2 * span + 0.01
    assert 0 < (back - ROWS).norm() / ROWS.norm() < 0.12
    assert code.nbytes(128) == nbytes


@pytest.mark.parametrize("before", [quantised.rotated, quantised.centred, quantised.smoothed])
def test_what_is_done_before_changes_no_weight(before):
    q, k = (quantised.as_bf16(x) for x in (ROWS[:, :5] / 9, ROWS))
    wanted, found = ((a @ b.mT).softmax(-1) for a, b in ((q, k), before(q, k)))
    assert torch.allclose(wanted, found, atol=0.03)


def test_the_output_of_models_is_found_again():
    """What is captured, attended over as it is, gives what the layer gave; exact rows leave no error."""
    found = list(quantised.captured(quantised.ALIBI_MODEL, 300))
    assert [(name, layer) for name, layer, _ in found] == [
        (f"alibi_model, {kind}", str(layer)) for kind in ("text", "question") for layer in range(3)
    ]
    rows = found[1][2]
    stored = [quantised.INT8.read_back(one.float()) for one in (rows.key, rows.value)]

    def output(*exact):
        return quantised.output(rows, rows.query, rows.key, stored[0], rows.value, stored[1], *exact)

    distance = torch.arange(300 - len(rows.query[0]), 300)[:, None] - torch.arange(300)
    logit = rows.scale * rows.query @ rows.key.mT - rows.slopes.double()[:, None, None] * distance
    wanted = logit.masked_fill(distance < 0, -torch.inf).softmax(-1) @ rows.value
    assert torch.allclose(output(0, 300), wanted, atol=1e-12)
    assert torch.allclose(output(300, 1), wanted, atol=1e-12)
    losses = [float(quantised.error(output(0, newest), wanted).mean()) for newest in (1, 32, 64)]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.slow
def test_quantised(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantised, "MODEL", quantised.ALIBI_MODEL)
    quantised.main(["--length", "200", "--results", str(tmp_path), "--machine", "m"])
    with (tmp_path / "m" / "quantised.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == quantised.Result._fields
    assert {row["layer"] for row in rows} == {"", "0", "1", "2"}
    error = {(row["rows"], row["form"], row["exact"]): float(row["error"]) for row in rows}
    assert error["normal", "bf16", ""] == 0
    for name in ("heavy tails", "4 channels far from 0", "key bias before RoPE", "lognormal channels"):
        for kv in ("int8", "int4"):
            assert error[name, f"{kv}, rotated keys", ""] < error[name, kv, ""]
    assert error["near tokens", "int4", "newest 64"] < error["near tokens", "int4", ""] / 2
    assert error["a sink", "int4", "first 4"] < error["a sink", "int4", ""]
    assert "int4, exact newest 64" in capsys.readouterr().out


def test_a_haystack_and_its_questions():
    tokenizer = build_tokenizer()
    made = quantised_answers.make_haystack(tokenizer, 2048, 0)
    assert len(made.ids) == 2048 - 3
    ids = torch.tensor(made.ids)
    for question, answer in zip(made.questions, made.answers, strict=True):
        (at,) = torch.nonzero((ids[:-1] == question[1]) & (ids[1:] == question[2])).flatten().tolist()
        assert torch.equal(ids[at + 2 : at + 6], answer)
        assert at < 2048 - 512
    assert made.ids != quantised_answers.make_haystack(tokenizer, 2048, 1).ids


@pytest.fixture(scope="module")
def alibi():
    return load_model(quantised_answers.ALIBI_MODEL, "float32")


def test_answers_and_recited_words(alibi):
    """In pieces and in one go the exact cache says the same; the bytes are those of one reader."""
    model, tokenizer = alibi
    plan = quantised_answers.plans(model, tokenizer, 700)["full"]
    given = quantised_answers.make_haystack(tokenizer, 1000, 3)
    outcomes = []
    with torch.no_grad(), attach(model, plan):
        for piece in (100, 1000):
            cache = RazorCache(model.config, plan)
            outcomes.append(quantised_answers.ask(model, cache, given, piece))
            assert outcomes[-1].kv_bytes == plan.kv_bytes(997, head_dim=16, dtype=torch.float32)
        assert torch.equal(outcomes[0].right, outcomes[1].right)
        assert outcomes[0].right.float().mean() > 0.5
        ids = quantised_answers.make_text(tokenizer, 600, 0)
        for piece in (100, 300):
            found = quantised_answers.recite(model, RazorCache(model.config, plan), ids, [350, 500, 599], piece)
            assert found.tokens == 599 - piece
            logits = model(torch.tensor([ids]), **{CACHE: RazorCache(model.config, plan)}).logits[0, :-1]
            wanted = torch.tensor(ids[1:])
            loss = torch.nn.functional.cross_entropy(logits[piece:], wanted[piece:], reduction="sum")
            assert found.loss == pytest.approx(float(loss), rel=1e-4)
            assert found.right.tolist() == [bool(logits[at - 1].argmax() == ids[at]) for at in (350, 500, 599)]


def test_quantised_answers(alibi, tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_answers, "load_model", lambda *_: alibi)
    flags = "--length 1024 --haystacks 1 --texts 1 --kv model int8 int4 --model m --machine m"
    quantised_answers.main([*flags.split(), "--results", str(tmp_path)])
    with (tmp_path / "m" / "quantised_answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == quantised_answers.Result._fields
    assert len(rows) == 2 * 2 * 3
    for base, *others in (rows[i : i + 3] for i in range(0, 12, 3)):
        assert (base["kv"], base["lost"], base["gained"]) == ("model", "0", "0")
        for row in others:
            assert int(row["correct"]) == int(base["correct"]) - int(row["lost"]) + int(row["gained"])
            assert int(row["kv_bytes"]) < int(base["kv_bytes"]) / 2
            assert (row["perplexity"] != base["perplexity"]) or row["task"] == "questions"
