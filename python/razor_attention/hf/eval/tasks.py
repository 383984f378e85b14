# SPDX-License-Identifier: Apache-2.0
"""Generated questions about something said far back in the context, for any tokenizer and any small language.

A context is filler with a few facts in it, cut to exactly the wanted number of tokens. What the sentences look like is
said by a task file: templates over lists of words. All that is asked for is drawn at random, and no two keys, values or
passages of a context share two neighbouring words, so that an answer can only come from its place in the text.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...files import read_json

FACT_SHARE = 1 / 8  # of the tokens of a context with many facts
MOST_FACTS = 500
HOPS = 2  # links between an asked key and its value in `tracking`
CHAINS = 4  # of them in a context, one is asked for
PASSAGES = 4  # in a context of `copy`, one is asked for
PASSAGE_WORDS, START_WORDS, COPIED_WORDS = 16, 4, 8
TURNS = 4  # questions over one context in `multiturn`
_TRIES = 1000


class Turn(NamedTuple):
    """A question, and the text that must follow it."""

    ids: list[int]
    answer: str
    limit: int  # tokens to generate


class Sample(NamedTuple):
    """A context and questions about it; context and first question have exactly the wanted number of tokens."""

    context: list[int]
    turns: list[Turn]
    depth: float  # where what is asked first starts: 0 = first token of the prompt, 1 = last


@dataclass(frozen=True)
class TaskFile:
    """A small language to write tasks in: templates whose {names} stand for a word of the list with that name.

    Args:
        words: name -> words to draw from.
        filler: sentences that say nothing.
        key, value: what facts are about, and what is asked for.
        needle: a fact, with {key} and {value}.
        ask: the end of a prompt which the value must follow, with {key}; `again` the same after an earlier answer.
        link: says that {key} has the value of {other}; "" where the language has no such thing: no `tracking`.
        passage, recite: words to repeat, with {passage}; the end of a prompt, with their {start}.
        passage_word: one word of a passage.
        slack: tokens generated beyond those of the answer.
    Raises:
        TypeError: filler: expected a list of strings, got 'the wind .'
    """

    words: dict[str, list[str]]
    filler: list[str]
    key: str
    value: str
    needle: str
    ask: str
    again: str
    passage: str
    recite: str
    passage_word: str
    link: str = ""
    slack: int = 8

    def __post_init__(self) -> None:
        lists = {"filler": self.filler, **self.words} if isinstance(self.words, dict) else {"words": None}
        for name, value in lists.items():
            if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
                raise TypeError(f"{name}: expected a list of strings, got {value!r}")
        for name in ("key", "value", "needle", "ask", "again", "passage", "recite", "passage_word", "link"):
            if not isinstance(text := getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {text!r}")
            given = {"key", "value", "other", "passage", "start"} | set(self.words)
            if unknown := set(re.findall(r"\{(\w+)\}", text)) - given:
                raise ValueError(f"{name}: expected names of word lists, got {sorted(unknown)[0]!r}")
        if isinstance(self.slack, bool) or not isinstance(self.slack, int) or self.slack < 0:
            raise ValueError(f"slack: expected an integer >= 0, got {self.slack!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskFile:
        """Read a JSON file with these entries, "format": "razor-attention tasks" and "version": 1.

        Args:
            path: file to read.
        Returns:
            The language.
        Raises:
            ValueError: tasks.json: expected the key 'filler', got a file without it
        """
        names = [one.name for one in fields(cls)]
        record = read_json(path, "tasks", tuple(name for name in names if name not in ("link", "slack")))
        try:
            return cls(**{name: record[name] for name in names if name in record})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{Path(path).name}: {error}") from error

    def write(self, template: str, rng: random.Random, **given: str) -> str:
        """A template with its names replaced, by what is given or by words drawn at random."""
        return re.sub(
            r"\{(\w+)\}", lambda name: given[name[1]] if name[1] in given else rng.choice(self.words[name[1]]), template
        )


ENGLISH = TaskFile.load(Path(__file__).with_name("english.json"))


class Writer:
    """Writes samples of every task in one language for one tokenizer.

    Args:
        tokenizer: of the model; its BOS stands in front of a context where it puts it there itself.
        language: of the texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, language: TaskFile) -> None:
        self.tokenizer, self.language = tokenizer, language
        bos = tokenizer.bos_token_id
        self.prefix = [bos] if bos is not None and list(tokenizer("").input_ids[:1]) == [bos] else []
        self._lengths: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without any special token.

        Raises:
            ValueError: task file: expected words that the tokenizer knows, got 'zebra'; ...
        """
        ids = [int(one) for one in self.tokenizer(text, add_special_tokens=False).input_ids]
        if (unknown := self.tokenizer.unk_token_id) is not None and unknown in ids:
            words = [
                word for word in text.split() if unknown in self.tokenizer(word, add_special_tokens=False).input_ids
            ]
            raise ValueError(
                f"task file: expected words that the tokenizer knows, got {(words or [text])[0]!r}; "
                "a model with a small vocabulary needs a task file of its own"
            )
        return ids

    def sample(self, task: str, length: int, depth: float | None, seed: str) -> Sample:
        """One sample; the same for the same arguments.

        Args:
            task: of TASKS.
            length: tokens of the prompt, context and first question.
            depth: where to put what is asked first, 0 = start, 1 = right before the question; None: anywhere.
            seed: of all that is drawn.
        """
        rng = random.Random(f"{seed} {task} {length} {depth}")
        place = rng.random() if depth is None else depth
        return TASKS[task](self, rng, length, place)

    def _distinct(self, draw: Callable[[], str], used: set[Any]) -> str:
        """A text that shares no two neighbouring words with those before it, none at all if it is one word."""
        for _ in range(_TRIES):
            words = (text := draw()).split()
            parts: set[Any] = set(pairwise(words)) or set(words)
            if len(set(words)) == len(words) and not parts & used:
                used |= parts
                return text
        raise ValueError(f"task file: expected more words to draw from, got two texts like {text!r} again and again")

    def _draw(self, rng: random.Random, template: str, used: set[Any]) -> str:
        """A text by a template, distinct from all before it."""
        return self._distinct(lambda: self.language.write(template, rng), used)

    def _turn(self, text: str, answer: str) -> Turn:
        return Turn(self.ids(text), answer, len(self.ids(f" {answer}")) + self.language.slack)

    def _many(self, length: int, least: int) -> int:
        """Facts in a context with many."""
        write, language, rng = self.language.write, self.language, random.Random(0)
        key, value = write(language.key, rng), write(language.value, rng)
        needle = self._length(write(language.needle, rng, key=key, value=value))
        return min(max(least, round(length * FACT_SHARE / needle)), MOST_FACTS)

    def _length(self, sentence: str) -> int:
        """Tokens of a sentence that follows another one."""
        if sentence not in self._lengths:
            self._lengths[sentence] = len(self.ids(f" {sentence}"))
        return self._lengths[sentence]

    def _compose(
        self, rng: random.Random, length: int, said: Sequence[tuple[float, str]], turns: list[Turn], asked: str
    ) -> Sample:
        """Filler with the sentences that are said at their depths, cut at its front to the exact length."""
        language = self.language
        wanted = length - len(self.prefix) - len(turns[0].ids)
        missing = wanted - sum(self._length(sentence) for _, sentence in said)
        if missing < 0:
            raise ValueError(f"length: expected at least {length - missing} tokens for this task, got {length}")
        filler: list[str] = []
        while missing > 0:
            filler.append(language.write(rng.choice(language.filler), rng))
            missing -= self._length(filler[-1])
        for _ in range(_TRIES):  # what sentences take together is known only when they stand together
            text, before = self._place(filler, said, wanted, asked)
            ids = self.ids(text)
            over = len(ids) - wanted
            if over < 0:
                filler.insert(0, language.write(rng.choice(language.filler), rng))
            elif filler and over >= self._length(filler[0]):
                filler.pop(0)
            elif filler or over == 0:
                break
            else:
                raise ValueError(f"length: expected at least {length + over} tokens for this task, got {length}")
        start = len(self.prefix) + len(self.ids(before)) - over
        return Sample([*self.prefix, *ids[over:]], turns, max(start, 0) / (length - 1))

    def _place(self, filler: list[str], said: Sequence[tuple[float, str]], wanted: int, asked: str) -> tuple[str, str]:
        """The text, and what of it stands before `asked`; the first filler is cut later: it stays first."""
        waiting = sorted(said, key=lambda one: one[0])
        text, at = list(filler[:1]), 0  # at: tokens so far, the first sentence not counted
        for sentence in [*filler[1:], ""]:
            step = self._length(sentence) if sentence else wanted
            while waiting and at + step / 2 > waiting[0][0] * (wanted - self._length(waiting[0][1])):
                text.append(waiting.pop(0)[1])
                at += self._length(text[-1])
            text += [sentence] if sentence else []
            at += step
        text += [sentence for _, sentence in waiting]
        return " ".join(text), " ".join(text[: text.index(asked)])

    def _needle(self, rng: random.Random, length: int, place: float) -> Sample:
        """One fact in filler."""
        return self._asked(rng, length, place, others=0, turns=1)

    def _multikey(self, rng: random.Random, length: int, place: float) -> Sample:
        """Many facts of the same form, one is asked for."""
        return self._asked(rng, length, place, others=self._many(length, 2) - 1, turns=1)

    def _multiturn(self, rng: random.Random, length: int, place: float) -> Sample:
        """Many facts, some asked for one after the other."""
        return self._asked(rng, length, place, others=max(self._many(length, TURNS) - TURNS, 0), turns=TURNS)

    def _asked(self, rng: random.Random, length: int, place: float, *, others: int, turns: int) -> Sample:
        language, used = self.language, set[Any]()
        key, value = language.key, language.value
        facts = [(self._draw(rng, key, used), self._draw(rng, value, used)) for _ in range(turns + others)]
        sentences = [language.write(language.needle, rng, key=key, value=value) for key, value in facts]
        depths = [place, *(rng.random() for _ in facts[1:])]
        asked = [
            self._turn(language.write(language.again if number else language.ask, rng, key=key), value)
            for number, (key, value) in enumerate(facts[:turns])
        ]
        return self._compose(rng, length, list(zip(depths, sentences, strict=True)), asked, sentences[0])

    def _tracking(self, rng: random.Random, length: int, place: float) -> Sample:
        """Chains of keys with the same value, the value said for the first key alone, asked for by the last."""
        language, used, said = self.language, set[Any](), list[tuple[float, str]]()
        if not language.link:
            raise ValueError("tracking: expected a task file with a link, got one without")
        for number in range(CHAINS):
            keys = [self._draw(rng, language.key, used) for _ in range(HOPS + 1)]
            value = self._draw(rng, language.value, used)
            depths = sorted(rng.uniform(place if number == 0 else 0, 1) for _ in range(HOPS))
            first = language.write(language.needle, rng, key=keys[0], value=value)
            said.append((place if number == 0 else rng.uniform(0, depths[0]), first))
            for depth, (other, key) in zip(depths, pairwise(keys), strict=True):
                said.append((depth, language.write(language.link, rng, key=key, other=other)))
            if number == 0:
                asked, turn = first, self._turn(language.write(language.ask, rng, key=keys[-1]), value)
        return self._compose(rng, length, said, [turn], asked)

    def _copy(self, rng: random.Random, length: int, place: float) -> Sample:
        """Passages of random words; the start of one is repeated, and must be gone on with."""
        language, used = self.language, set[Any]()
        passages = [self._draw(rng, " ".join([language.passage_word] * PASSAGE_WORDS), used) for _ in range(PASSAGES)]
        said = [language.write(language.passage, rng, passage=passage) for passage in passages]
        words = passages[0].split()
        answer = " ".join(words[START_WORDS : START_WORDS + COPIED_WORDS])
        turn = self._turn(language.write(language.recite, rng, start=" ".join(words[:START_WORDS])), answer)
        depths = [place, *(rng.random() for _ in said[1:])]
        return self._compose(rng, length, list(zip(depths, said, strict=True)), [turn], said[0])


TASKS: dict[str, Callable[[Writer, random.Random, int, float], Sample]] = {
    "needle": Writer._needle,
    "multikey": Writer._multikey,
    "tracking": Writer._tracking,
    "copy": Writer._copy,
    "multiturn": Writer._multiturn,
}


def is_right(text: str, answer: str) -> bool:
    """Whether a text holds the answer as whole words, blanks counted as one."""
    text, answer = (" ".join(one.split()) for one in (text, answer))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
