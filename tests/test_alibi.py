# SPDX-License-Identifier: Apache-2.0
"""alibi.py: windows of all layers from their weights; the golden ones are msmodelslim's own (data/README.md)."""

import math
import re
from pathlib import Path

import pytest
import torch

from razor_attention import FULL, alibi_slopes, alibi_windows
from razor_attention.alibi import AlibiWeights, attend_and_measure, smallest_windows

GOLDEN = torch.load(Path(__file__).parent / "data" / "alibi_windows.pt", weights_only=True)


def exactly(message):
    return f"^{re.escape(message)}$"


def weights(layers=3, rows=20, heads=4, cols=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, rows, heads, cols, generator=draw)) for _ in range(layers)]


@pytest.mark.filterwarnings("ignore:alpha")  # negative windows, which these cases want
@pytest.mark.parametrize("case", [c for c in GOLDEN if c["kind"] == "get_wins"], ids=lambda case: case["name"])
def test_windows_of_the_binary(case):
    found = alibi_windows(case["qk_list"], case["slopes"], theta=case["theta"], alpha=case["alpha"])
    assert case["robust"]
    assert found.tolist() == case["expected"]


@pytest.mark.parametrize("num_heads", [1, 4, 8, 12, 40])
def test_slopes_of_the_golden_cases(num_heads):
    wanted = [c["slopes"] for c in GOLDEN if len(c["slopes"]) == num_heads and torch.is_tensor(c["slopes"])]
    assert all(alibi_slopes(num_heads).equal(slopes) for slopes in wanted)


def test_heads_without_a_bound():
    """Nothing positive: with slopes as numbers the binary divides in float64, with a tensor it does not."""
    none = [(torch.ones(2, 12, 3), -torch.ones(2, 12, 3))]
    slopes = alibi_slopes(12)
    listed = alibi_windows(none, slopes.tolist(), theta=1e-5, alpha=9999)
    assert listed.tolist() == [int((math.log(1e-5) + 9999) / slope) for slope in slopes.tolist()]
    numbers = torch.tensor(9999 + math.log(1e-5), dtype=torch.float32)
    assert alibi_windows(none, slopes, theta=1e-5, alpha=9999).tolist() == [
        int(slope.reciprocal() * numbers) for slope in slopes
    ]


def test_layers_are_taken_one_at_a_time():
    alive = []

    def stream():
        for query, key in weights():
            alive.append(query)
            assert len(alive) == 1
            yield query, key
            alive.clear()

    whole = alibi_windows(weights(), alibi_slopes(4))
    assert alibi_windows(stream(), alibi_slopes(4)).equal(whole)
    assert alibi_windows(tuple(weights()), alibi_slopes(4)).equal(whole)
    assert alibi_windows(torch.stack([torch.stack(layer) for layer in weights()]), alibi_slopes(4)).equal(whole)


@pytest.mark.parametrize("method", ["per_head", "theorem"])
def test_windows_of_each_layer(method):
    layers = [AlibiWeights(*layer, (torch.ones(20), None)) for layer in weights()]
    each = alibi_windows(layers, alibi_slopes(4), method=method, per_layer=True)
    assert each.shape == (3, 4)
    assert alibi_windows(layers, alibi_slopes(4), method=method).equal(each.amax(0))
    for i, layer in enumerate(layers):
        assert alibi_windows([layer], alibi_slopes(4), method=method).equal(each[i])


def test_theta_and_alpha():
    """A smaller theta asks for more, except in msmodelslim's rule."""
    slopes = alibi_slopes(4)
    layers = [AlibiWeights(*layer, (torch.ones(20), torch.ones(20))) for layer in weights()]
    for method in ("per_head", "theorem"):
        assert (
            alibi_windows(layers, slopes, theta=1e-6, method=method)
            > alibi_windows(layers, slopes, theta=1e-3, method=method)
        ).all()
    assert (alibi_windows(layers, slopes, theta=1e-6) < alibi_windows(layers, slopes, theta=1e-3)).all()
    assert (
        alibi_windows(layers, slopes, alpha=50, method="per_head") < alibi_windows(layers, slopes, method="per_head")
    ).all()
    assert alibi_windows(layers, slopes, alpha=50, method="theorem").equal(
        alibi_windows(layers, slopes, method="theorem")
    )


def test_theorem_counts_weight_and_bias_of_the_norm():
    slopes, [(query, key)] = alibi_slopes(4), weights(1)
    gamma, bias = torch.full((20,), 2.0), torch.full((20,), 0.5)
    norm = [float(torch.linalg.matrix_norm((query[:, h] @ key[:, h].T).double(), ord=2)) for h in range(4)]
    for parts, square in (((gamma, None), 80.0), ((gamma, bias), 85.0)):
        wanted = ((2 * square * torch.tensor(norm, dtype=torch.float64) - math.log(1e-5)) / slopes.double()).ceil()
        found = alibi_windows([AlibiWeights(query, key, parts)], slopes, method="theorem")
        assert (found - wanted.long()).abs().max() <= 1


def test_windows_are_clamped():
    tiny = [(1e-20 * query, 1e-20 * key, (torch.ones(20), None)) for query, key in weights()]
    for method in ("per_head", "theorem"):
        assert alibi_windows(tiny, [1e6] * 4, theta=1.0, alpha=0, method=method).tolist() == [1] * 4
        assert alibi_windows(tiny, [1e-12] * 4, theta=1e-5, alpha=0, method=method).tolist() == [FULL] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "calibrated"}, "method: expected 'msmodelslim', 'per_head' or 'theorem', got 'calibrated'"),
        (
            {"per_layer": True},
            "per_layer: expected False with method 'msmodelslim', which has one window a head, got True",
        ),
        ({"weights": []}, "weights: expected at least one layer, got none"),
        (
            {"method": "theorem"},
            "weights[0] norm: expected that before the projections for method 'theorem', got none",
        ),
        ({"theta": 0.0}, "theta: expected a value > 0 and <= 1, got 0"),
        ({"alpha": -1.0}, "alpha: expected a finite value >= 0, got -1"),
        ({"slopes": [1.0, 0.0, 1.0, 1.0]}, "slopes: expected values > 0, got 0 for head 1"),
        ({"slopes": [1.0]}, "slopes: expected shape [4], got [1]"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        alibi_windows(**{"weights": weights(), "slopes": alibi_slopes(4)} | options)


@pytest.mark.parametrize("name", ["theta", "alpha"])
@pytest.mark.parametrize("value", ["a", None, True])
def test_numbers(name, value):
    with pytest.raises(TypeError, match=exactly(f"{name}: expected a number, got {type(value).__name__}")):
        alibi_windows(weights(), alibi_slopes(4), **{name: value})


@pytest.mark.parametrize("slopes", [[1.0], [1.0, 0.0, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0]])
def test_bad_slopes_for_the_theorem(slopes):
    layers = [(*layer, (torch.ones(20), None)) for layer in weights()]
    with pytest.raises(ValueError, match=r"^slopes: expected "):
        alibi_windows(layers, slopes, method="theorem")


@pytest.mark.parametrize("method", ["per_head", "theorem"])
def test_weights_that_are_not_finite(method):
    layers = [(query, key, (torch.ones(20), None)) for query, key in weights()]
    layers[1][0][3, 2, 1] = math.nan
    with pytest.raises(
        ValueError, match=exactly("weights[1] query: expected finite products with key, got nan in head 2")
    ):
        alibi_windows(layers, alibi_slopes(4), method=method)
    assert (alibi_windows(layers, alibi_slopes(4)) > 0).all()  # msmodelslim leaves that head of that layer out


# --- calibrated


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_and_measure(heads, kv_heads, dtype):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 300, 8, generator=draw).to(dtype)
    key, value = (torch.randn(2, kv_heads, 300, 8, generator=draw).to(dtype) for _ in range(2))
    slopes = alibi_slopes(heads)
    out, mass = attend_and_measure(query, key, value, slopes, 0.7)

    token = torch.arange(300)
    distance = token[:, None] - token
    k, v = (side.double().repeat_interleave(heads // kv_heads, 1) for side in (key, value))
    logit = 0.7 * query.double() @ k.mT - slopes.double()[:, None, None] * distance
    weight = logit.masked_fill(distance < 0, -torch.inf).softmax(-1)
    close = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), weight @ v, rtol=close, atol=close)
    for w in (0, 1, 2, 17, 255, 256, 299, 300):
        lost = (weight * (distance >= w)).sum(-1).amax((0, 2))
        torch.testing.assert_close(mass[:, w].double(), lost, rtol=1e-4, atol=1e-9)


def test_smallest_windows():
    mass = torch.tensor([[1.0, 0.5, 0.1, 0.1, 0.0, 0.0], [1.0, 1.0, 1.0, 0.2, 0.0, 0.0]])
    for theta, wanted in ((1.0, [1, 1]), (0.6, [1, 3]), (0.5, [1, 3]), (0.1, [2, 4]), (1e-3, [4, 4])):
        assert smallest_windows(mass, theta).tolist() == wanted
    with pytest.raises(ValueError, match=exactly("theta: expected a value > 0 and <= 1, got 0")):
        smallest_windows(mass, 0)
