# SPDX-License-Identifier: Apache-2.0
"""Samples for train_gates: passkeys hidden in any text and asked for at its end, or prompts and answers from a file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
_LENGTHS, _DEPTHS = 50, 1000  # different lengths of the haystack, and places in it
_SHALLOWEST, _DEEPEST = 0.05, 0.95


class Sample(NamedTuple):
    """One text, and where the last hidden states of full and compressed heads are compared."""

    ids: list[int]  # one sequence with its first token, no padding
    asked: list[bool]  # for each of them: whether it belongs to an answer


def passkey_samples(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    shortest: int = 1000,
    longest: int = 32000,
    limit: int | None = None,
    passkeys: int = 10,
    words: int = 32,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Sample]:
    """DuoAttention's synthetic task without end: passkeys at random depths of a text, all asked for in order after it.

    Sample number i depends on the seed and i alone.

    Args:
        tokenizer: any that knows the words of the passkeys, which are those of the radio alphabet.
        text: the haystack; a part of it is taken, and it starts again where it is too short.
        shortest, longest: tokens of the haystack, 50 lengths between them are drawn from.
        limit: most tokens of a sample; where the drawn haystack does not fit it is cut. None: no limit.
        passkeys: in one sample.
        words: of one passkey.
        seed: of everything drawn.
        start: number of the first sample.
    Returns:
        An iterator; the answers' tokens are asked.
    Raises:
        ValueError: tokenizer: expected one that knows the words of passkeys, got unknown tokens; ...
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest: expected 1..longest = {longest} tokens, got {shortest}")
    if passkeys < 1 or words < 1:
        raise ValueError(f"passkeys, words: expected integers >= 1, got {passkeys} and {words}")

    def tokens(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False).input_ids)

    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in tokens(_WORDS):
        raise ValueError(
            "tokenizer: expected one that knows the words of passkeys, got unknown tokens; give samples of your own"
        )
    haystack, prefix = tokens(text), list(tokenizer("").input_ids)[:1]
    if not haystack:
        raise ValueError("text: expected at least one token, got none")

    def draw() -> Iterator[Sample]:
        for number in itertools.count(start):
            rng = random.Random(f"{seed} {number}")
            length = shortest + (longest - shortest) * rng.randrange(_LENGTHS) // (_LENGTHS - 1)
            hidden, questions, asked = [], list[int](), list[bool]()
            for index in range(passkeys):
                key = " ".join(rng.choice(_WORDS.split()) for _ in range(words))
                hidden.append(tokens(f"\nPasskey number {index + 1} is: {key}.\n"))
                question, answer = tokens(f"\nWhat is passkey number {index + 1}? It is:"), tokens(f" {key}.")
                questions += question + answer
                asked += [False] * len(question) + [True] * len(answer)
            rest = len(prefix) + sum(map(len, hidden)) + len(questions)
            if limit is not None and rest >= limit:
                raise ValueError(f"limit: expected more than {rest} tokens for {passkeys} passkeys, got {limit}")
            length = length if limit is None else min(length, limit - rest)
            first = rng.randrange(max(1, len(haystack) - length))
            body = list(itertools.islice(itertools.cycle(haystack), first, first + length))
            places = sorted(rng.sample(range(_DEPTHS), min(passkeys, _DEPTHS)), reverse=True)
            for at, needle in zip(places, reversed(hidden), strict=False):  # from the end, so that places stay
                cut = int(length * (_SHALLOWEST + (_DEEPEST - _SHALLOWEST) * at / (_DEPTHS - 1)))
                body[cut:cut] = needle
            ids = prefix + body + questions
            yield Sample(ids, [False] * (len(ids) - len(asked)) + asked)

    return draw()


def read_samples(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    """Prompts and answers of a file in turn, from the start again after the last one.

    Args:
        path: JSON lines, each {"prompt": text, "answer": text}.
        tokenizer: of the model; the answer is tokenised by itself, without special tokens.
    Returns:
        An iterator without end; the tokens that predict the answer are asked: the prompt's last, the answer's but the
        last.
    Raises:
        ValueError: asked.jsonl: expected a prompt and an answer in line 3, got ...
    """
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            prompt = list(tokenizer(record["prompt"]).input_ids)
            answer = list(tokenizer(record["answer"], add_special_tokens=False).input_ids)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected a prompt and an answer in line {number}, got {error!r}") from error
        if not prompt or not answer:
            raise ValueError(f"{path}: expected a prompt and an answer in line {number}, got an empty one")
        ids = prompt + answer[:-1]
        samples.append(Sample(ids, [at >= len(prompt) - 1 for at in range(len(ids))]))
    if not samples:
        raise ValueError(f"{path}: expected a prompt and an answer in each line, got an empty file")
    return itertools.cycle(samples)
