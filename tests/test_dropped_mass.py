# SPDX-License-Identifier: Apache-2.0
"""hf/mass.py, and the windows calibrated by it: what a text's queries would lose, from the models' own maps."""

import pytest
import torch
from transformers import BloomForCausalLM, MptForCausalLM

from razor_attention import dropped_mass, find_windows
from test_find_windows import MODELS, bloom, exactly, made
from tiny_models import prompts


def brute_force(model, ids):
    """[layers, heads, tokens + 1] from the model's own attention maps."""
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    maps, tokens = torch.stack(maps).double().amax(1), ids.shape[1]  # of one sequence
    mass = torch.zeros(*maps.shape[:2], tokens + 1, dtype=torch.float64)
    for w in range(tokens + 1):
        for p in range(tokens):
            mass[..., w] = torch.maximum(mass[..., w], maps[..., p, : max(0, p - w + 1)].sum(-1))
    return mass


@pytest.fixture(scope="module")
def read():
    model, *_ = made("bloom")
    model.eval()
    ids = prompts(70)[0]
    return model, ids, brute_force(model, ids)


def test_dropped_mass(read):
    model, ids, wanted = read
    mass = dropped_mass(model, ids, progress=False)
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-4, atol=1e-7)
    assert (mass[..., 0] == 1).all()
    assert (mass[..., -1] == 0).all()
    assert (mass.diff() <= 0).all()
    assert 2 < (mass > 1e-2).sum(-1).min() < (mass > 1e-2).sum(-1).max() < 70


@pytest.mark.parametrize("name", ["mpt", "baichuan"])
def test_dropped_mass_of_other_models(name):
    model, *_ = made(name)
    model.eval()
    ids = prompts(40)[0]
    model.set_attn_implementation("eager")
    wanted = brute_force(model, ids)
    torch.testing.assert_close(dropped_mass(model, ids, progress=False).double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "packed"])
def test_measuring_computes_what_the_model_does(name):
    model, *_ = made(name)
    model.eval()
    ids, out = prompts(40)[0], []
    hook = model.base_model.register_forward_hook(lambda *parts: out.append(parts[-1].last_hidden_state))
    with torch.no_grad():
        model(ids, use_cache=False)
    dropped_mass(model, ids, progress=False)
    hook.remove()
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theta", [1e-1, 3e-2, 1e-2])
def test_calibrated(read, theta):
    model, ids, mass = read
    wanted = (mass > theta).int().argmin(-1)  # the first window that drops no more
    options = {"method": "calibrated", "theta": theta, "ids": ids, "progress": False}
    found = find_windows(model, per_layer=True, **options)
    assert found.equal(wanted.clamp(min=1))
    assert find_windows(model, **options).equal(found.amax(0))
    assert (mass.gather(-1, found[..., None]) <= theta).all()
    assert (mass.gather(-1, found[..., None] - 1) > theta).all()


def test_calibrated_takes_the_worst_sequence(read):
    model, ids, _ = read
    other = prompts(70, seed=1)[0]
    both = dropped_mass(model, torch.cat([ids, other]), progress=False)
    each = [dropped_mass(model, one, progress=False) for one in (ids, other)]
    torch.testing.assert_close(both, torch.maximum(*each), rtol=1e-5, atol=1e-8)


def test_measuring_leaves_the_model_as_it_was(read):
    model, ids, _ = read
    kinds = [type(module) for module in model.modules()], model.config._attn_implementation
    dropped_mass(model, ids, progress=False)
    hook = model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dropped_mass(model, ids, progress=False)
    hook.remove()
    assert ([type(module) for module in model.modules()], model.config._attn_implementation) == kinds


@pytest.mark.parametrize("name", ["razor_mass", "razor_probe"])
@pytest.mark.parametrize("build", [BloomForCausalLM, MptForCausalLM])
def test_our_other_attention_functions_are_not_for_models(build, name):
    model = build(
        build.config_class(vocab_size=96, n_layers=2, n_layer=2, n_head=2, n_heads=2, hidden_size=48, d_model=48)
    )
    model.config._attn_implementation_internal = name
    function = {"razor_mass": "dropped_mass", "razor_probe": "find_heads"}[name]
    message = f"attn_implementation: expected '{name}' inside {function} alone, got a forward pass of its own"
    with pytest.raises(ValueError, match=exactly(message)):
        model(prompts(8)[0])


def test_ids_beyond_the_vocabulary():
    with pytest.raises(ValueError, match=exactly("ids: expected values from 0 to 95, got 5 to 96")):
        dropped_mass(bloom(), torch.tensor([[5, 96]]), progress=False)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (torch.zeros(5, dtype=torch.int64), "[5] torch.int64"),
        (torch.zeros(1, 5), "[1, 5] torch.float32"),
        (torch.zeros(1, 1, dtype=torch.int64), "[1, 1] torch.int64"),
        ([[1, 2, 3]], "list"),
    ],
)
def test_ids(ids, got):
    message = f"ids: expected (batch, tokens), int64, at least 2 tokens, got {got}"
    with pytest.raises(ValueError, match=exactly(message)):
        find_windows(bloom(), method="calibrated", ids=ids, progress=False)
