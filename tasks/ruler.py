"""RULER's tasks that need no data, generated for any tokenizer: needles, variable tracking, common and frequent words.

Source: NVIDIA/RULER scripts/data/synthetic/{niah,variable_tracking,common_words_extraction,freq_words_extraction}.py.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kvcli.evals.haystack import haystack, made_up, words
from kvcli.evals.lengths import fitted
from kvcli.evals.ruler import Episode, Ruler
from kvcli.evals.spec import Tokens

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {n} variables are assigned the value {query}, they are: "
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
EXAMPLE_TOKENS = 500
Kind = Literal["numbers", "words", "uuids"]


@dataclass(frozen=True, kw_only=True)
class Needles(Ruler):
    """Needles `magic value for key` among noise, an essay or other needles; `queries` of the `keys` are asked for.

    The essay is the text of `niah_haystack` in --data-dir or kvcli's own sentences (the original's is under copyright).
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        lists = words(data_dir)
        essay = haystack(data_dir) if self.haystack == "essay" else None
        guess = {"noise": self.length // 22, "essay": self.length * 3 // 4, "needle": self.length // 40}[self.haystack]

        def drawn(kind: Kind, rng: random.Random) -> str:
            if kind == "numbers":
                return str(rng.randrange(10**6, 10**7))
            if kind == "uuids":
                return str(uuid.UUID(int=rng.getrandbits(128), version=4))
            return f"{rng.choice(lists.adjectives)}-{rng.choice(lists.nouns)}"

        def make(index: int, rng: random.Random) -> Episode:
            keys: dict[str, list[str]] = {}
            while len(keys) < max(self.keys, self.queries):
                keys[drawn(self.key, rng)] = [drawn(self.value, rng) for _ in range(self.values)]
            needles = [NEEDLE.format(kind=self.value, key=k, value=v) for k, found in keys.items() for v in found]
            rng.shuffle(needles)
            asked = rng.sample(sorted(keys), self.queries)
            depths, salt = sorted(rng.sample(DEPTHS, len(needles))), rng.random()

            def others(n: int) -> list[str]:
                stream = random.Random(salt)
                pairs = [(drawn(self.key, stream), drawn(self.value, stream)) for _ in range(n)]
                return [NEEDLE.format(kind=self.value, key=k, value=v) for k, v in pairs]

            def build(n: int) -> str:
                if essay is not None:
                    return _among(re.split(r"(?<=[.!?])\s+", essay.words(n)), needles, depths)
                lines = [NOISE] * n if self.haystack == "noise" else others(n)
                places = sorted(random.Random(salt).sample(range(n), len(needles)), reverse=True)
                for place, needle in zip(places, needles, strict=True):
                    lines.insert(place, needle)
                return "\n".join(lines)

            own = (lists.own and "words" in (self.key, self.value)) or (essay is not None and essay.own)
            answers = tuple(value for key in asked for value in keys[key])
            return Episode(self._template(asked), build, answers, len(needles), guess, own)

        return make

    def _template(self, asked: list[str]) -> str:
        """The official one; its words for several needles become those for one."""
        kind, template = str(self.value), NIAH
        if self.queries * self.values == 1:
            for several, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
                template = template.replace(several, one)
            kind = kind[:-1]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        return template.replace("{kind}", kind).replace("{query}", query)


def _among(sentences: list[str], needles: list[str], depths: list[int]) -> str:
    """Needles between sentences, at depths in percent of their number."""
    cuts = [int(len(sentences) * depth / 100) for depth in depths]
    pieces = [" ".join(sentences[a:b]) for a, b in zip([0, *cuts], [*cuts, len(sentences)], strict=True)]
    mixed = [text for pair in zip(pieces, [*needles, ""], strict=True) for text in pair]
    return " ".join(mixed[:-1])


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Ruler):
    """Chains `VAR B = VAR A` in noise; all names of the first one are asked for. One example of 500 tokens by default.

    Differs: the variables of an example are drawn for each sample, not renamed in one common example.
    """

    chains: int = 1
    hops: int = 4

    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        return lambda index, rng: self._episode(rng, 5, self.hops, self.length // 22)

    def example(self, data_dir: str | None, rng: random.Random, tokens: Tokens) -> str:
        episode = self._episode(rng, 3, min(10, self.hops), 15)
        n = fitted(episode.prompt, tokens, EXAMPLE_TOKENS, episode.guess, episode.least)
        return episode.prompt(max(n, episode.least)) + " " + " ".join(episode.answers) + "\n\n"

    def _episode(self, rng: random.Random, letters: int, hops: int, guess: int) -> Episode:
        names: dict[str, None] = {}
        while len(names) < (hops + 1) * self.chains:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        listed = list(names)
        chains = [listed[i : i + hops + 1] for i in range(0, len(listed), hops + 1)]
        values = [str(rng.randrange(10_000, 99_999)) for _ in chains]
        texts = [
            [f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(chain))]
            for chain, value in zip(chains, values, strict=True)
        ]
        salt = rng.random()

        def build(n: int) -> str:
            places, lines = random.Random(salt), [NOISE] * n
            for text in texts:
                chosen = sorted(places.sample(range(len(lines)), len(text)))
                for shift, (place, line) in enumerate(zip(chosen, text, strict=True)):
                    lines.insert(place + shift, line)
            return "\n".join(lines)

        template = TRACKING.replace("{query}", values[0]).replace("{n}", str(hops + 1))
        return Episode(template, build, tuple(chains[0]), hops + 1, guess)


@dataclass(frozen=True, kw_only=True)
class CommonWords(Ruler):
    """A numbered list in which ten words stand `common` times and all others `uncommon` times. One example by default.

    Below 4,096 tokens 6 and 1 times, as in the original. Differs: where the lists have too few words for the length,
    made-up words follow (the original has another file for that).
    """

    common: int = 30
    uncommon: int = 3

    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        listed, own = _vocabulary(data_dir)
        times = (self.common, self.uncommon) if self.length >= 4096 else (6, 1)
        return lambda index, rng: _counting(rng, listed, times, max(11, self.length // (5 * times[1]) - 90), own)

    def example(self, data_dir: str | None, rng: random.Random, tokens: Tokens) -> str:
        n, times = (40, (10, 3)) if self.length >= 4096 else (20, (3, 1))
        episode = _counting(rng, _vocabulary(data_dir)[0], times, n, False)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(episode.answers, 1))
        return f"{episode.prompt(n)} {answer}\n"


def _vocabulary(data_dir: str | None) -> tuple[list[str], bool]:
    lists = words(data_dir)
    return sorted({*lists.nouns, *lists.adjectives, *lists.verbs}), lists.own


def _counting(rng: random.Random, listed: list[str], times: tuple[int, int], guess: int, own: bool) -> Episode:
    """Ten common words of `times[0]` and n - 10 others of `times[1]` places each, all shuffled."""
    order, salt = rng.sample(listed, len(listed)), rng.random()

    def build(n: int) -> str:
        chosen = order[:n]
        if n > len(order):
            known = set(listed)
            chosen += [w for w in made_up(2 * n) if w not in known][: n - len(order)]
        repeated = chosen[:10] * times[0] + chosen[10:] * times[1]
        random.Random(salt).shuffle(repeated)
        return " ".join(f"{i}. {word}" for i, word in enumerate(repeated, 1))

    return Episode(COMMON, build, tuple(order[:10]), 11, guess, own)


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Ruler):
    """Made-up words with frequencies by a zeta law; the most frequent one is `...`, the next three are asked for."""

    alpha: float = 2.0
    letters: int = 6

    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        from scipy.special import zeta

        different = max(4, (self.length - self.max_new_tokens) // 50)
        shares = [k**-self.alpha / float(zeta(self.alpha)) for k in range(1, different + 1)]

        def make(index: int, rng: random.Random) -> Episode:
            vocabulary: dict[str, None] = {}
            while len(vocabulary) < different:
                vocabulary["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
            coded, salt = ["...", *list(vocabulary)[1:]], rng.random()

            def build(n: int) -> str:
                said = [w for word, share in zip(coded, shares, strict=True) for w in [word] * int(n * share)]
                random.Random(salt).shuffle(said)
                return " ".join(said)

            # from 100 words on, the fourth and the fifth word differ in frequency
            return Episode(FREQUENT, build, tuple(coded[1:4]), 100, self.length // 3)

        return make
