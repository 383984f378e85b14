# SPDX-License-Identifier: Apache-2.0
"""The definition, once more and on its own: dense, one query at a time, float64 numpy, the whole token history at hand.

Nothing here knows pages, rings or running sums; nothing here is shared with the package.
Letters: H query heads, K kv heads, L tokens of one sequence (padding left out), D head_dim.
"""

import math

import numpy as np

FULL = 2**31 - 1


def read_exactly(position, sink, window, stored=None):
    """Which of the tokens 0 ... position a query at `position` reads exactly: [position + 1] bool.

    stored: tokens in the cache before a dense call, None for a call that is not dense.
    """
    token = np.arange(position + 1)
    exact = (token < sink) | (position - token < window)
    if stored is not None:
        exact |= token >= stored  # new ones
        exact |= stored - 1 - token < window  # kept after the last stored token
    return exact


def attend(query, key, value, exact, *, compensate, slope, scale):
    """Output of one query [D] over the tokens [position + 1, D], of which `exact` are read one by one: [D]."""
    position, read = len(exact) - 1, np.flatnonzero(exact)
    logits = scale * (key[read] @ query) - slope * (position - read)
    rows = value[read]
    dropped = np.flatnonzero(~exact)
    if compensate and len(dropped):
        logits = np.append(logits, scale * np.dot(query, key[dropped].mean(axis=0)) + np.log(len(dropped)))
        rows = np.vstack([rows, value[dropped].mean(axis=0)])
    if not len(logits):
        return np.zeros_like(query)
    weights = np.exp(logits - logits.max())
    return weights @ rows / weights.sum()


def attention(query, key, value, policy, *, scale, slopes=None, dense_start=None):
    """Outputs of a whole sequence: [H, L, D].

    Args:
        query: [H, L, D]. key, value: [K, L, D]. All float64.
        policy: (sink, window, compensate) of each of the K heads.
        slopes: [H] or None.
        dense_start: [L], tokens stored before the dense call that brought this token, -1 for any other call; or None.
    """
    out = np.zeros_like(query)
    group = len(query) // len(key)
    for head in range(len(query)):
        kv_head = head // group
        sink, window, compensate = policy[kv_head]
        for position in range(query.shape[1]):
            start = -1 if dense_start is None else dense_start[position]
            out[head, position] = attend(
                query[head, position],
                key[kv_head, : position + 1],
                value[kv_head, : position + 1],
                read_exactly(position, sink, window, None if start < 0 else start),
                compensate=compensate,
                slope=0.0 if slopes is None else slopes[head],
                scale=scale,
            )
    return out


def dropped_tokens(seen, sink, window):
    """Tokens that are gone after `seen` tokens."""
    return [token for token in range(seen) if not (token < sink or seen - 1 - token < window)]


def dropped_sum(rows, sink, window):
    """Sum of the dropped ones of rows [L, D]: [D]."""
    total = np.zeros(rows.shape[1])
    for token in dropped_tokens(len(rows), sink, window):
        total += rows[token]
    return total


def cache_rows(seen, sink, window):
    """{row: token} of a cache after `seen` tokens: sinks first, then a ring."""
    kept = sorted(set(range(seen)) - set(dropped_tokens(seen, sink, window)))
    return {token if token < sink else sink + (token - sink) % window: token for token in kept}


def head_scores(query, key, period, *, scale):
    """(echo, induction) of one head: query, key [1 + period * repeats, D] float64. Builds the map."""
    logits = scale * query @ key.T
    tokens = len(query)
    for row in range(tokens):
        logits[row, row + 1 :] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    attention_map = (weights / weights.sum(axis=1, keepdims=True))[1:, 1:]
    echo = induction = 0.0
    for row in range(period, tokens - 1):
        for copy in range(row % period, row, period):
            echo += attention_map[row, copy]
            induction += attention_map[row, copy + 1]
    return echo / (tokens - 1 - period), induction / (tokens - 1 - period)


def quantised(x, kv):
    """What finite rows [count, D] are once stored as int8 or int4, and the step at each element: two of float64."""
    x = x.astype(np.float32)
    if kv == "int8":
        scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
        code = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
        return np.clip(np.rint(code), -127, 127).astype(float) * scale, np.broadcast_to(scale, x.shape)
    out, step = np.zeros(x.shape), np.zeros(x.shape)
    for row, number in np.ndindex(len(x), -(-x.shape[1] // 16)):
        part = row, slice(16 * number, 16 * number + 16)
        low, high = min(x[part].min(), np.float32(0)), max(x[part].max(), np.float32(0))
        mantissa, exponent = math.frexp((high - low) / np.float32(16))
        eighths = math.ceil(16 * mantissa)  # 8 ... 16 of a power of two
        scale = max(math.ldexp(eighths, exponent - 4), 2.0**-126)
        zero = math.ceil(-low / np.float32(scale) - np.float32(0.5))
        if zero > np.float32(15.5) - high / np.float32(scale):
            scale += 2.0 ** (math.frexp(scale)[1] - 4)
            zero = math.ceil(-low / np.float32(scale) - np.float32(0.5))
        code = np.clip(np.rint(x[part] / np.float32(scale)) + zero, 0, 15)
        out[part] = (code.astype(float) - zero) * scale
        step[part] = scale
    return out, step
