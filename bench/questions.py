# SPDX-License-Identifier: Apache-2.0
"""A synthetic language of keyed facts, and questions which can only be answered by looking far back.

A text is a row of short sentences. Facts name who did what to four things, ``mia hid lamp rope coin bell .``, filler
talks about the weather, ``the old wind moves over the quiet hill .``. A question repeats a name and a verb, ``? mia
hid``, and the answer is the four things. The things are drawn at random, so an answer which is not read from the text
is right with a probability of about ``len(THINGS) ** -4``. Every pair (name, verb) and every pair of neighbouring
things occurs in one fact only, so that two words always say where to read on.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "ada amy ann ben bob cal cleo dan dora eli emma eva finn gus hal ida ian ivan jack jane joe kai kim lea leo lily "
    "luke max mia nell nico noah ola otto paul pia quin rex rosa ruth sam sara tess theo tom uma vera zoe"
)
VERBS = _words("bought built cut found gave hid kept lost made sent sold took")
THINGS = _words(
    "anchor apple arrow axe bag ball banana barrel basket bell belt bench blanket boat book boot bottle bowl box bread "
    "brick broom brush bucket button cable cake camera candle cap card carpet chair chalk cheese clock coat coin comb "
    "crown cup curtain desk dice door dress drum egg fan feather fence flag flute fork glass globe glove hammer harp "
    "hat helmet honey hook jar jug kettle key kite knife ladder lamp lantern leaf lemon letter lock map mask mirror "
    "nail needle net oar onion paddle paint pan paper pear pearl pen piano pillow pin pipe plate plum pot purse ring "
    "rope rug saddle salt scarf shell shoe shovel soap spoon stamp stone stool string sword table tent thread tile "
    "torch towel tray trunk vase violin wagon wallet wheel whistle wool"
)
ADJECTIVES = _words("old quiet grey warm cold slow soft bright")
NOUNS = _words("wind hill river cloud field snow rain moon")
MOVES = _words("moves drifts rests turns waits")
WHERE = _words("over under near behind")
WORDS = (*SPECIAL, ".", "?", "the", *NAMES, *VERBS, *THINGS, *ADJECTIVES, *NOUNS, *MOVES, *WHERE)

ANSWER_TOKENS = 4
FACT_TOKENS = 2 + ANSWER_TOKENS + 1
QUESTION_TOKENS = 3
FACT_SHARE = 1 / 8  # share of a haystack's tokens which belong to facts, the rest is filler
NEAREST_ASKED = 64  # tokens from an answer in a text back to where it was said, where the text is as long


@dataclass(frozen=True)
class Question:
    """One prompt of exactly the wanted length, and the tokens which must follow it."""

    ids: list[int]  # the prompt with <bos> in front, ends in "? name verb"
    answer: list[int]
    depth: float  # where the asked fact starts: 0 = first token, 1 = last token of the prompt


@dataclass(frozen=True)
class Fact:
    """``name verb thing thing thing thing``, as words."""

    key: tuple[str, str]
    things: tuple[str, ...]

    def sentence(self) -> list[str]:
        return [*self.key, *self.things, "."]

    def question(self) -> list[str]:
        return ["?", *self.key]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer of the language. It puts <bos> in front of a text and joins words with blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = vocabulary["<bos>"]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_facts(rng: random.Random, count: int) -> list[Fact]:
    """``count`` facts in which no pair (name, verb) and no pair of neighbouring things occurs twice."""
    if count > len(NAMES) * len(VERBS):
        raise ValueError(f"count: expected at most {len(NAMES) * len(VERBS)} facts with different keys, got {count}")
    keys = [divmod(key, len(VERBS)) for key in rng.sample(range(len(NAMES) * len(VERBS)), count)]
    seen: set[tuple[str, str]] = set()
    facts = []
    for name, verb in keys:
        while True:
            things = tuple(rng.sample(THINGS, ANSWER_TOKENS))
            pairs = set(pairwise(things))
            if not pairs & seen:
                break
        seen |= pairs
        facts.append(Fact((NAMES[name], VERBS[verb]), things))
    return facts


def filler_sentence(rng: random.Random) -> list[str]:
    """One sentence of five to nine words which says nothing worth asking for."""
    head = ["the", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(MOVES)]
    if rng.random() < 0.25:
        return [*head, "."]
    tail = [rng.choice(WHERE), "the", rng.choice(ADJECTIVES), rng.choice(NOUNS), "."]
    return head + tail


def haystack(rng: random.Random, facts: list[Fact], length: int, *, last: int = 0) -> list[list[str]]:
    """Sentences with exactly ``length`` words: the facts in random order, filler between them.

    The first sentence is the tail of a filler sentence, which makes the length exact. ``last`` of the facts are left
    out of the shuffle and must be put in by the caller: only their length is reserved.
    """
    missing = length - FACT_TOKENS * (len(facts) + last)
    if missing < 0:
        raise ValueError(
            f"length: expected at least {length - missing} words for {len(facts) + last} facts, got {length}"
        )
    sentences = [fact.sentence() for fact in facts]
    while missing > 0:
        sentences.append(filler_sentence(rng)[-missing:])
        missing -= len(sentences[-1])
    short = sentences.pop() if len(sentences) > len(facts) else []
    rng.shuffle(sentences)
    return [short, *sentences]


def _make_question(rng: random.Random, ids_of: dict[str, int], length: int, depth: float | None) -> Question:
    body = length - 1 - QUESTION_TOKENS
    count = min(max(2, round(body * FACT_SHARE / FACT_TOKENS)), body // FACT_TOKENS, len(NAMES) * len(VERBS))
    asked, *others = make_facts(rng, count)
    sentences = haystack(rng, others, body, last=1)
    latest = length - (512 if length >= 2048 else length // 4) - FACT_TOKENS
    wanted = rng.uniform(0, latest) if depth is None else depth * (length - 1)
    starts = [1]  # places between two sentences, counted from <bos> = 0
    for sentence in sentences:
        starts.append(starts[-1] + len(sentence))
    allowed = [i for i, start in enumerate(starts) if depth is not None or start <= latest]
    cut = min(allowed, key=lambda i: abs(starts[i] - wanted))
    words = [word for sentence in [*sentences[:cut], asked.sentence(), *sentences[cut:]] for word in sentence]
    ids = [ids_of[word] for word in ["<bos>", *words, *asked.question()]]
    return Question(ids, [ids_of[word] for word in asked.things], starts[cut] / (length - 1))


def make_questions(
    tokenizer: Any, *, length: int, count: int, seed: int = 0, depth: float | None = None
) -> list[Question]:
    """``count`` questions, each a haystack of exactly ``length`` tokens which ends in a question for one of its facts.

    ``depth`` puts the asked fact at this relative place (0 = start, 1 = directly in front of the question). By default
    the place is uniform, but outside the last 512 tokens (the last quarter of a prompt shorter than 2048 tokens).
    """
    smallest = 1 + 2 * FACT_TOKENS + QUESTION_TOKENS
    if length < smallest:
        raise ValueError(f"length: expected at least {smallest} tokens, got {length}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected a number in 0..1, got {depth}")
    rng = random.Random(seed)
    ids_of = tokenizer.get_vocab()
    return [_make_question(rng, ids_of, length, depth) for _ in range(count)]


def as_batch(questions: list[Question], *, answers: bool = False) -> torch.Tensor:
    """Prompts of the same length as one (count, tokens) tensor, with the answers behind them if wanted."""
    return torch.tensor([q.ids + q.answer if answers else q.ids for q in questions], dtype=torch.long)


def text_words(rng: random.Random, length: int) -> list[str]:
    """A text of exactly ``length`` words, <bos> included, which states facts and asks for them later, answers included.

    Half of it is filler, a sixth states facts, a third asks for one. How far back an answer was said last is drawn
    log-uniformly from ``NEAREST_ASKED`` to the whole text, so that every octave of distance has as many answers.
    """
    words = ["<bos>"]
    facts = iter(make_facts(rng, min(length // 24 + 1, len(NAMES) * len(VERBS))))
    said: dict[Fact, int] = {}  # where its things were said last
    while len(words) < length:
        kind = rng.choices(("filler", "fact", "ask"), (3, 1, 2))[0]
        at = len(words) + QUESTION_TOKENS
        if kind == "ask" and said:
            wanted = rng.uniform(math.log(NEAREST_ASKED), math.log(max(NEAREST_ASKED, at)))
            fact = min(said, key=lambda one: abs(math.log(at - said[one]) - wanted))
            words += [*fact.question(), *fact.things, "."]
            said[fact] = at
        elif kind != "filler" and (new := next(facts, None)):
            said[new] = len(words) + len(new.key)
            words += new.sentence()
        else:
            words += filler_sentence(rng)
    return words[:length]


def make_text(tokenizer: Any, length: int, seed: int) -> list[int]:
    """The token ids of one text of ``text_words``; the same for the same seed."""
    ids_of = tokenizer.get_vocab()
    return [ids_of[word] for word in text_words(random.Random(seed), length)]


class Asked(NamedTuple):
    """A token of an answer within a text."""

    position: int
    distance: int  # tokens back to the same token where the fact was said last, at most ``position``


def asked_tokens(tokenizer: Any, ids: list[int]) -> list[Asked]:
    """The tokens of a text which can only be predicted by looking back, and how far."""
    question_mark = tokenizer.get_vocab()["?"]
    said: dict[tuple[int, ...], int] = {}
    asked = []
    for at in range(2, len(ids)):
        key = tuple(ids[at - 2 : at])
        if at >= QUESTION_TOKENS and ids[at - QUESTION_TOKENS] == question_mark and key in said:
            asked += [Asked(p, at - said[key]) for p in range(at, min(at + ANSWER_TOKENS, len(ids)))]
        said[key] = at
    return asked
