# SPDX-License-Identifier: Apache-2.0
"""Tensors for ATB against a model of its two operators, written here from their documented behaviour alone, in float64.

Letters: R rows (sequence, kv head), H query heads, K kv heads, G = H / K, D head_dim, NB blocks of BS places.
"""

import math
import re

import numpy as np
import pytest
import torch

import oracle
from razor_attention import FULL, LayerCache, Plan, alibi_slopes
from razor_attention.atb import alibi_mask, cache_tensors, mean_weight, plan_tensors
from razor_attention.hf.names import CACHE

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp, relative: the rounding of a mean row


# --- the operators


def reshape_and_cache(new, cache, slot_mapping, wins, seq_lens, offset_index=None):
    """Write new [tokens, K, D] into cache [NB, BS, 1, D], row by row into consecutive places from slot_mapping [R] on.

    Without offset_index: the last wins[r] tokens. With: all tokens if offset_index[r] is -1 or wins[r] is 0, else the
    tokens before offset_index[r], one mean of the wins[r] from there on, and the rest.
    """
    flat, heads, start = cache.reshape(-1, cache.shape[-1]), new.shape[1], 0
    assert np.shares_memory(flat, cache)
    for b, count in enumerate(seq_lens):
        for h in range(heads):
            r, tokens = b * heads + h, new[start : start + count, h]
            if offset_index is None:
                rows = tokens[count - wins[r] :]
            elif offset_index[r] == -1 or wins[r] == 0:
                rows = tokens
            else:
                first, behind = offset_index[r], offset_index[r] + wins[r]
                assert 0 <= first < behind <= count
                rows = np.concatenate([tokens[:first], tokens[first:behind].mean(0, keepdims=True), tokens[behind:]])
            flat[slot_mapping[r] : slot_mapping[r] + len(rows)] = rows
        start += count


def paged_attention(
    query, key_cache, value_cache, block_tables, context_lens, *, qk_scale, razor_offset=None, mask=None
):
    """query [T, H, D]; row r = t * K + h is attention of G query heads over one head's places. Returns [T, H, D].

    logit = (q.k + razor_offset) * qk_scale + mask; razor_offset [NB, BS] is looked up by physical place, mask
    [T, H, 1, places] by the place's number in its row.
    """
    out, size = np.zeros_like(query), key_cache.shape[1]
    heads = len(context_lens) // len(query)
    group = query.shape[1] // heads
    for r, length in enumerate(context_lens):
        assert length > 0
        t, mine = r // heads, slice(r % heads * group, (r % heads + 1) * group)
        number = np.arange(length)
        block, place = block_tables[r, number // size], number % size
        logit = query[t, mine] @ key_cache[block, place, 0].T
        if razor_offset is not None:
            logit = logit + razor_offset[block, place]
        logit = logit * qk_scale
        if mask is not None:
            logit = logit + mask[t, mine, 0, :length]
        weight = np.exp(logit - logit.max(-1, keepdims=True))
        out[t, mine] = weight @ value_cache[block, place, 0] / weight.sum(-1, keepdims=True)
    return out


def test_the_model_of_the_operators_on_numbers_worked_out_by_hand():
    cache = np.full((3, 4, 1, 1), np.nan)
    new = np.array([1.0, 2, 4, 6, 10, 20]).reshape(6, 1, 1)  # two sequences, of 5 and 1 tokens
    reshape_and_cache(new, cache, [4, 0], [2, 7], [5, 1], [1, -1])
    assert cache.ravel()[:8].tolist()[4:] == [1, 3, 6, 10]  # 2 and 4 became their mean
    assert cache.ravel()[0] == 20
    assert np.isnan(cache.ravel()[[1, 2, 3, 8, 9, 10, 11]]).all()
    reshape_and_cache(new, cache, [8, 3], [3, 1], [5, 1])
    assert cache.ravel()[[8, 9, 10, 3]].tolist() == [4, 6, 10, 20]

    keys = np.zeros((2, 2, 1, 1))
    values = np.array([5.0, 1, 0, np.nan]).reshape(2, 2, 1, 1)  # row: block 1, then block 0
    offset = np.array([[np.log(3) / 0.25, 0], [0, 0]])
    call = {"key_cache": keys, "value_cache": values, "block_tables": np.array([[1, 0]]), "context_lens": [3]}
    values[1, 1], query = 2.0, np.ones((1, 1, 1))
    # weights: 1 of value 0, 1 of value 2, 3 of value 5
    assert paged_attention(query, **call, qk_scale=0.25, razor_offset=offset).item() == pytest.approx(17 / 5)
    # without the division by the scale the 3 becomes 3 ** 0.25
    expected = (2 + 5 * 3**0.25) / (2 + 3**0.25)
    assert paged_attention(query, **call, qk_scale=0.25, razor_offset=offset * 0.25).item() == pytest.approx(expected)
    mask = np.log([[[[1.0, 2.0, 1.0]]]])
    assert paged_attention(query, **call, qk_scale=0.25, mask=mask).item() == pytest.approx(9 / 4)


# --- what the exporter hands over

ROPE = ((4, FULL, False), (3, 20, True), (0, 33, True), (5, 16, False), (2, 0, True))  # sinks, window, compensation
ALIBI = ((0, FULL, False), (0, 1, False), (0, 33, False), (0, 64, False))
LENGTHS = (150, 3, 37)


class Tokens:
    """Three sequences of some length as a model makes them, and a cache that has stored them."""

    def __init__(self, policy, lengths, dtype, *, head_dim=64, group=2, page_size=16, slopes=None):
        self.policy, self.lengths, self.slopes, self.scale = policy, lengths, slopes, head_dim**-0.5
        batch, longest = len(lengths), max(lengths)
        drift = torch.linspace(-1, 1, longest)[:, None]  # so that dropped values differ from kept ones
        shape = batch, len(policy), longest, head_dim
        self.key, self.value = (torch.randn(shape).to(dtype), (torch.randn(shape) + drift).to(dtype))
        self.query = torch.randn(batch, len(policy) * group, head_dim).to(dtype)  # of each last token
        self.cache = LayerCache(
            *zip(*policy, strict=True),
            batch_size=batch, head_dim=head_dim, dtype=dtype, page_size=page_size, alibi_slopes=slopes,
        )  # fmt: skip
        pad = longest - torch.tensor(lengths)
        for first in range(0, longest, 29):  # pieces, so that the sequences' pages lie mixed
            part = slice(first, first + 29)
            count = self.key[:, :, part].shape[2]
            self.cache.append(self.key[:, :, part], self.value[:, :, part], pad=(pad - first).clamp(0, count))

    def history(self, b, kv_head):
        """Keys and values of a sequence, [tokens, D] float64."""
        own = slice(self.key.shape[2] - self.lengths[b], None)
        return (x[b, kv_head, own].double().numpy() for x in (self.key, self.value))

    def packed(self, side):
        """[tokens of all sequences, K, D] float64, as the operator takes new tokens."""
        own = [side[b, :, side.shape[2] - n :].transpose(0, 1) for b, n in enumerate(self.lengths)]
        return torch.cat(own).double().numpy()

    def expected(self, weight=float):
        """Our definition at each last token, [T, H, D]; `weight` of the mean of N tokens, N if not said."""
        query, out = self.query.double().numpy(), np.zeros(self.query.shape)
        group = query.shape[1] // len(self.policy)
        for b, h in np.ndindex(query.shape[:2]):
            sink, window, compensate = self.policy[h // group]
            key, value = self.history(b, h // group)
            exact = oracle.read_exactly(self.lengths[b] - 1, sink, window)
            slope = 0.0 if self.slopes is None else float(self.slopes[h])
            logit = self.scale * (key @ query[b, h]) - slope * np.arange(self.lengths[b])[::-1]
            logit, rows, gone = logit[exact], value[exact], ~exact
            if compensate and gone.any():
                mean = self.scale * (key[gone].mean(0) @ query[b, h]) + np.log(weight(gone.sum()))
                logit, rows = np.append(logit, mean), np.vstack([rows, value[gone].mean(0)])
            share = np.exp(logit - logit.max())
            out[b, h] = share @ rows / share.sum()
        return out

    def attend(self, tensors):
        names = {"key_cache", "value_cache", "block_tables", "context_lens", "razor_offset", "mask"}
        call = {name: as_numpy(x) for name, x in tensors.items() if name in names}
        return paged_attention(self.query.double().numpy(), **call, qk_scale=self.scale)


def as_numpy(tensor):
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def write(tokens, made, room=None):
    """Both caches of plan_tensors' layout after the operator has written the prompts; unwritten places are NaN."""
    blocks, size = made["razor_offset"].shape if "razor_offset" in made else room
    call = {k: as_numpy(made[k]) for k in ("slot_mapping", "wins", "seq_lens", "offset_index") if k in made}
    caches = [np.full((blocks, size, 1, tokens.key.shape[3]), np.nan) for _ in range(2)]
    for cache, side in zip(caches, (tokens.key, tokens.value), strict=True):
        reshape_and_cache(tokens.packed(side), cache, **call)
    return caches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "block_size"), [(16, 16), (64, 128), (16, 48)])
def test_a_cache_in_atb_form_attends_as_ours(dtype, page_size, block_size):
    tokens = Tokens(ROPE, LENGTHS, dtype, page_size=page_size)
    made = cache_tensors(tokens.cache, block_size=block_size)
    ours = tokens.expected()
    reached = oracle_of_cache(tokens)
    assert np.abs(reached - ours).max() < 4 * UNIT[dtype]  # the kernels agree with the oracle as well
    # Nothing but the rounding of the mean rows: their share of the weight times half an ulp of a value.
    assert np.abs(tokens.attend(made) - ours).max() < 2 * UNIT[dtype]
    exact = slice(0, 2), slice(6, 8)  # heads without compensation round nothing
    for heads in exact:
        np.testing.assert_allclose(tokens.attend(made)[:, heads], ours[:, heads], rtol=1e-12, atol=1e-12)


def oracle_of_cache(tokens):
    """Our own kernels at each last token: a cache of everything before it attends with it. [T, H, D]."""
    lengths = [n - 1 for n in tokens.lengths]
    cache = LayerCache(
        *zip(*tokens.policy, strict=True),
        batch_size=len(lengths), head_dim=tokens.key.shape[3], dtype=tokens.key.dtype, alibi_slopes=tokens.slopes,
    )  # fmt: skip
    pad = max(lengths) - torch.tensor(lengths)
    cache.append(tokens.key[:, :, :-1], tokens.value[:, :, :-1], pad=pad)
    last = (x[:, :, -1:] for x in (tokens.key, tokens.value))
    return cache.attend(tokens.query[:, :, None], *last)[:, :, 0].double().numpy()


@pytest.mark.parametrize(("offset", "weight"), [("mindie", lambda n: n ** (64**-0.5)), ("none", lambda n: 1.0)])
def test_other_offsets_give_other_weights(offset, weight):
    tokens = Tokens(ROPE, (1500, 900, 700), torch.float16)
    made, right = (cache_tensors(tokens.cache, offset=name) for name in (offset, "atb"))
    theirs, ours = tokens.expected(weight), tokens.expected()
    assert np.abs(tokens.attend(made) - theirs).max() < 4e-4
    assert np.abs(tokens.attend(right) - ours).max() < 4e-4
    apart = np.abs(theirs - ours).reshape(3, len(ROPE), -1).max(-1)  # [sequence, kv head]
    assert (apart[:, [1, 2, 4]] > 0.1).all()
    assert (apart[:, [0, 3]] == 0).all()
    for n in (1, 2, 700, 10000):
        assert mean_weight(n, 64**-0.5, offset) == pytest.approx(weight(n))
    assert mean_weight(10000, 128**-0.5, "mindie") == pytest.approx(2.257, abs=1e-3)
    assert mean_weight(10000, 128**-0.5, "atb") == 10000


def test_a_scale_of_ones_own():
    tokens = Tokens(ROPE, LENGTHS, torch.float16)
    tokens.scale = 0.3
    assert np.abs(tokens.attend(cache_tensors(tokens.cache, scale=0.3)) - tokens.expected()).max() < 1e-3
    assert np.abs(tokens.attend(cache_tensors(tokens.cache)) - tokens.expected()).max() > 0.02


def test_the_layout_written_out():
    plan = Plan([[2, 2]], [[5, FULL]], [[True, True]])
    (made,) = plan_tensors(plan, [20, 5], head_dim=32, block_size=16, max_new_tokens=3)
    assert {name: x.tolist() for name, x in made.items() if name != "razor_offset"} == {
        "block_tables": [[0, 0], [1, 2], [3, 0], [4, 0]],
        "context_lens": [2 + 1 + 5, 20, 5, 5],
        "slot_mapping": [0, 16, 48, 64],
        "wins": [13, 0, 0, 0],
        "offset_index": [2, -1, -1, -1],
        "seq_lens": [20, 5],
    }
    assert all(x.dtype == torch.int32 for name, x in made.items() if name != "razor_offset")
    offset = made["razor_offset"]
    assert (offset.dtype, offset.shape) == (torch.float32, (5, 16))
    assert offset.nonzero().tolist() == [[0, 2]]
    assert offset[0, 2].item() == pytest.approx(math.log(13) * math.sqrt(32))
    # 24 rows and room of 9 take a third block of 16, and every later block moves on by one
    (made,) = plan_tensors(plan, [24, 5], head_dim=32, block_size=16, max_new_tokens=9)
    assert made["block_tables"].tolist() == [[0, 1, 0], [2, 3, 4], [5, 0, 0], [6, 0, 0]]


def test_the_length_rule_is_each_sequences_own():
    plan = Plan.from_heads({0: [0]}, num_layers=2, num_kv_heads=2, sink_size=4, min_window=40, window_fraction=0.5)
    first, second = plan_tensors(plan, [200, 60], head_dim=64)
    assert first["wins"].tolist() == [0, 200 - 4 - 100, 0, 60 - 4 - 40]
    assert second["wins"].tolist() == [96, 96, 16, 16]


@pytest.mark.parametrize("block_size", [16, 128])
def test_prompts_written_by_the_operator_attend_as_ours(block_size):
    policy = (*ROPE[:4], (2, 1, True))  # a plan has no window of nothing
    tokens = Tokens(
        policy, (150, 3, 37, 24, 25, 22), torch.float16
    )  # 24 drops one token of head 1, which then keeps it
    plan = Plan(*([list(x)] for x in zip(*tokens.policy, strict=True)))
    (made,) = plan_tensors(plan, tokens.lengths, head_dim=64, block_size=block_size)
    assert made["offset_index"].view(6, 5)[:, 1].tolist() == [3, -1, 3, -1, 3, -1]
    keys, values = write(tokens, made)
    reached = tokens.attend({**made, "key_cache": torch.tensor(keys), "value_cache": torch.tensor(values)})
    np.testing.assert_allclose(reached, tokens.expected(), rtol=2e-6, atol=2e-6)  # the float32 of razor_offset
    # The same places hold the same rows as in a snapshot, but for means that nobody asked for.
    snapshot = cache_tensors(tokens.cache, block_size=block_size)
    same = snapshot["context_lens"] == made["context_lens"]
    assert (~same).nonzero().flatten().tolist() == [b * 5 + 3 for b in (0, 2, 3, 4, 5)]
    for r in same.nonzero().flatten().tolist():
        for name, cache in (("key_cache", keys), ("value_cache", values)):
            place = np.arange(int(made["context_lens"][r]))
            theirs, ours = (
                x[table[r, place // block_size], place % block_size]
                for x, table in ((cache, made["block_tables"].numpy()),
                                 (as_numpy(snapshot[name]), snapshot["block_tables"].numpy()))
            )  # fmt: skip
            np.testing.assert_allclose(ours, theirs, rtol=UNIT[torch.float16], atol=1e-6)


def test_a_mean_that_nobody_asked_for_is_silent():
    tokens = Tokens(((4, 8, False),), (300,), torch.float16)
    (made,) = plan_tensors(Plan.streaming(1, 1, 4, 8), [300], head_dim=64)
    keys, values = write(tokens, made)
    call = {**made, "key_cache": torch.tensor(keys), "value_cache": torch.tensor(values)}
    np.testing.assert_allclose(tokens.attend(call), tokens.expected(), rtol=1e-12)
    heard = tokens.attend({**call, "razor_offset": torch.zeros_like(made["razor_offset"])})
    assert np.abs(heard - tokens.expected()).max() > 1e-3
    for offset in ("mindie", "none"):
        message = "offset: expected 'atb' for heads that drop tokens without compensation, got "
        with pytest.raises(ValueError, match=re.escape(message + repr(offset))):
            plan_tensors(Plan.streaming(1, 1, 4, 8), [300], head_dim=64, offset=offset)
        plan_tensors(Plan.streaming(1, 1, 4, 8), [12], head_dim=64, offset=offset)  # nothing dropped


def test_their_window_does_not_slide():
    """Ten tokens written behind a snapshot, as their runtime does it, against the definition with frozen tokens."""
    tokens, new = Tokens(ROPE, (150, 97), torch.float16), 10
    early = Tokens.__new__(Tokens)
    early.__dict__ = {**tokens.__dict__, "lengths": tuple(n - new for n in tokens.lengths)}
    cache = LayerCache(*zip(*ROPE, strict=True), batch_size=2, head_dim=64, dtype=torch.float16)
    cache.append(tokens.key[:, :, :-new], tokens.value[:, :, :-new], pad=150 - torch.tensor(tokens.lengths))
    made = cache_tensors(cache, block_size=16, max_new_tokens=new)
    before = {name: as_numpy(made[name]).copy() for name in ("key_cache", "value_cache")}
    for step in range(new):
        for name, side in (("key_cache", tokens.key), ("value_cache", tokens.value)):
            one = side[:, :, side.shape[2] - new + step].double().numpy()
            call = {k: as_numpy(made[k]) for k in ("wins", "seq_lens", "offset_index")}
            reshape_and_cache(one, before[name], as_numpy(made["slot_mapping"]) + step, **call)
    changed = {**made, "context_lens": made["context_lens"] + new}
    reached = tokens.attend({**changed, **{name: torch.tensor(x) for name, x in before.items()}})
    frozen = np.zeros_like(reached)
    for b, h in np.ndindex(reached.shape[:2]):
        sink, window, compensate = ROPE[h // 2]
        key, value = tokens.history(b, h // 2)
        seen = tokens.lengths[b] - new
        exact = np.concatenate([oracle.read_exactly(seen - 1, sink, window), np.ones(new, bool)])
        rest = {"compensate": compensate, "slope": 0.0, "scale": tokens.scale}
        frozen[b, h] = oracle.attend(tokens.query[b, h].double().numpy(), key, value, exact, **rest)
    assert np.abs(reached - frozen).max() < 1e-3
    assert np.abs(reached - tokens.expected()).max() > 0.02  # ours slides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alibi(dtype):
    slopes = alibi_slopes(8)
    tokens = Tokens(ALIBI, LENGTHS, dtype, slopes=slopes)
    made = cache_tensors(tokens.cache, block_size=16)
    assert "razor_offset" not in made
    assert made["mask"].shape == (3, 8, 1, 150)
    assert made["mask"][0, 4, 0, :34].tolist() == [*(torch.arange(-32, 1) * slopes[4]).to(dtype).tolist(), 0]
    exact = alibi_mask(slopes, made["context_lens"], num_kv_heads=4, dtype=torch.float64)
    np.testing.assert_allclose(tokens.attend({**made, "mask": exact}), tokens.expected(), rtol=1e-9, atol=1e-9)
    # in 16 bits a bias of -4 is off by up to 2 units of 1/128, of 1/1024
    assert np.abs(tokens.attend(made) - tokens.expected()).max() < 8 * UNIT[dtype]

    (made,) = plan_tensors(
        Plan.from_windows([w for _, w, _ in ALIBI], num_layers=1, num_kv_heads=4), LENGTHS, head_dim=64, alibi=True
    )
    assert made["wins"].tolist() == [min(n, w) for n in LENGTHS for _, w, _ in ALIBI] == made["context_lens"].tolist()
    blocks = int(made["block_tables"].max()) + 1
    keys, values = (torch.tensor(x) for x in write(tokens, made, room=(blocks, 128)))
    reached = tokens.attend({**made, "key_cache": keys, "value_cache": values, "mask": exact})
    np.testing.assert_allclose(reached, tokens.expected(), rtol=1e-9, atol=1e-9)


def test_ranks_have_the_rows_of_the_whole():
    plan = Plan(*([list(x)] for x in zip(*ROPE[:4], strict=True)))
    (whole,) = plan_tensors(plan, LENGTHS, head_dim=64)
    for rank in range(2):
        (part,) = plan_tensors(plan.select_kv_heads(2 * rank, 2 * rank + 2), LENGTHS, head_dim=64)
        rows = [b * 4 + 2 * rank + h for b in range(3) for h in range(2)]
        for name in ("context_lens", "wins", "offset_index"):
            assert part[name].tolist() == whole[name][rows].tolist()
        for r, row in enumerate(rows):
            block, place = ([x[name][i] // 128 for x, i in ((part, r), (whole, row))] for name in ("slot_mapping",) * 2)
            assert part["razor_offset"][block[0]].equal(whole["razor_offset"][place[1]])


def test_a_cache_after_beam_search():
    tokens = Tokens(ROPE, LENGTHS, torch.float16)
    before = tokens.attend(cache_tensors(tokens.cache))
    tokens.cache.reorder(torch.tensor([2, 0, 2]))
    made = cache_tensors(tokens.cache, block_size=32)
    tokens.query = tokens.query[[2, 0, 2]]
    np.testing.assert_array_equal(tokens.attend(made), before[[2, 0, 2]])


def test_the_layers_of_a_razor_cache(monkeypatch):
    """The shipped model at the end of a text: each layer's heads as our kernels attend, and with the other offsets."""
    from razor_attention.bench.demo import MODEL
    from razor_attention.bench.questions import make_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from razor_attention import RazorCache, attach

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float16)
    ids = torch.tensor([make_text(AutoTokenizer.from_pretrained(MODEL), 2048, 0)])
    plan = Plan.from_heads({1: [0]}, num_layers=4, num_kv_heads=4, min_window=64, window_fraction=0)
    cache, calls, attend = RazorCache(model.config, plan), [], LayerCache.attend

    def note(self, query, key, value, **options):
        calls.append((query, attend(self, query, key, value, **options)))
        return calls[-1][1]

    monkeypatch.setattr(LayerCache, "attend", note)
    with attach(model, plan), torch.inference_mode():
        for part in (ids[:, :-1], ids[:, -1:]):
            calls.clear()
            model(part, **{CACHE: cache})
    off = {"atb": [], "mindie": [], "none": []}  # |theirs - ours| / |ours| of every compressed query head
    for layer, (query, ours) in zip(cache.layers, calls, strict=True):
        compressed = (layer.cache.window_size != FULL).repeat_interleave(2).numpy()
        for offset, found in off.items():
            made = {name: as_numpy(x) for name, x in cache_tensors(layer.cache, offset=offset).items()}
            names = "key_cache", "value_cache", "block_tables", "context_lens", "razor_offset"
            call = {name: made[name] for name in names}
            theirs = paged_attention(query[:, :, 0].double().numpy(), **call, qk_scale=32**-0.5)[0]
            ours_here = ours[0, :, 0].double().numpy()
            apart = np.linalg.norm(theirs - ours_here, axis=-1) / np.linalg.norm(ours_here, axis=-1)
            assert apart[~compressed].max(initial=0) < 1e-3
            found.extend(apart[compressed])
    assert len(off["atb"]) == 4 * 8 - 2
    assert max(off["atb"]) < 2e-3
    assert np.mean(off["mindie"]) > 0.2
    assert np.mean(off["none"]) > np.mean(off["mindie"])


PLAN = Plan.from_heads({0: [1]}, num_layers=1, num_kv_heads=2, min_window=8, window_fraction=0)
NO_FORM = "of an ALiBi model, got {}; ATB has no such form"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_dim": 80}, ValueError, "head_dim: expected a multiple of 32, got 80"),
        ({"head_dim": 288}, ValueError, "head_dim: expected an integer <= 256, got 288"),
        ({"block_size": 24}, ValueError,
         "block_size: expected a multiple of 16 and at most 256 for this head_dim, got 24"),
        ({"head_dim": 256}, ValueError,
         "block_size: expected a multiple of 16 and at most 64 for this head_dim, got 128"),
        ({"block_size": 8}, ValueError, "block_size: expected an integer >= 16, got 8"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
        ({"offset": "log"}, ValueError, "offset: expected 'atb', 'mindie' or 'none', got 'log'"),
        ({"scale": 0.0}, ValueError, "scale: expected a number > 0, got 0.0"),
        ({"scale": math.nan}, ValueError, "scale: expected a number > 0, got nan"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
        ({"lengths": []}, ValueError, "lengths: expected at least one prompt, got none"),
        ({"lengths": [9, 0]}, ValueError, "lengths: expected an integer >= 1, got 0"),
        ({"lengths": [2**31 - 1]}, ValueError,
         "lengths: expected at most 2147483647 places in a layer, got 2147484288"),
        ({"alibi": True, "offset": "none"}, ValueError,
         "offset: expected 'atb' with alibi, which has no means to weigh, got 'none'"),
        ({"alibi": True}, ValueError, f"compensate: expected False in every head {NO_FORM.format(True)}"),
        ({"alibi": True, "plan": Plan.streaming(1, 1, 4, 8)}, ValueError,
         f"sink_size: expected 0 in every head {NO_FORM.format(4)}"),
    ],
)  # fmt: skip
def test_what_atb_cannot_have(change, error, message):
    call = {"plan": PLAN, "lengths": [100], "head_dim": 64, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        plan_tensors(call.pop("plan"), call.pop("lengths"), **call)


def test_caches_that_atb_cannot_have():
    def cache(policy, dtype=torch.float16, slopes=None, tokens=30):
        made = LayerCache(*policy, batch_size=1, head_dim=32, dtype=dtype, alibi_slopes=slopes)
        new = torch.randn(1, 1, tokens, 32).to(dtype)
        made.append(new, new)
        return made

    for made, message in (
        (cache(([4], [8], [True]), torch.float32), "cache: expected bfloat16 or float16, got torch.float32"),
        (cache(([4], [8], [True]), tokens=0), "cache: expected at least one token of each sequence, got 0"),
        (cache(([0], [0], [False])), "window_size: expected at least one token to attend to in every head, got none"),
        (cache(([4], [8], [False]), slopes=torch.ones(1)), f"sink_size: expected 0 in every head {NO_FORM.format(4)}"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            cache_tensors(made)
    for call, message in (
        ((torch.ones(3), torch.ones(4).int(), 2), "slopes: expected a multiple of num_kv_heads 2, got [3]"),
        ((torch.ones(4), torch.ones(3).int(), 2),
         "context_lens: expected [batch * num_kv_heads] with num_kv_heads 2, got [3]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            alibi_mask(*call[:2], num_kv_heads=call[2], dtype=torch.float16)
