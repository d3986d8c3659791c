"""Material for generated tasks: long plain texts and lists of words, from `--data-dir`, a package, or kvcli's own.

Own material is made by chance from the lists below. Samples built of it say so in their ids (`-own`): scores on it and
on other material are not to be compared.
"""

from __future__ import annotations

import importlib.util
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvcli.errors import KvcliError

TEXTS = "niah_haystack"
WORDS = "ruler/words"
_FILES = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")


@dataclass(frozen=True)
class Haystack:
    """A long text, and whether kvcli made it."""

    text: str
    own: bool

    def words(self, n: int) -> str:
        """The first n words with single blanks, from the beginning again where there are not as many."""
        words = _split(self.text)
        whole, rest = divmod(n, len(words))
        return " ".join([*words * whole, *words[:rest]])


@dataclass(frozen=True)
class Words:
    """English words, each list sorted as in its file, and whether kvcli made them up."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    own: bool


def haystack(data_dir: str | None) -> Haystack:
    """The texts of `niah_haystack/*.txt` in `--data-dir`, in the order of their names; without them kvcli's own."""
    folder = Path(data_dir).expanduser() / TEXTS if data_dir else None
    if folder is None or not folder.is_dir():
        return Haystack(filler(), True)
    files = sorted(folder.glob("*.txt"))
    text = "\n\n".join(_read(file).strip() for file in files)
    if not text.strip():
        raise KvcliError(f"no text in {folder}", given=f"--data-dir {data_dir}", fix="put .txt files into it")
    return Haystack(text, False)


def words(data_dir: str | None) -> Words:
    """RULER's word lists: `ruler/words/` in `--data-dir`, the package wonderwords; without both kvcli's own."""
    places = [Path(data_dir).expanduser() / WORDS] if data_dir else []
    spec = importlib.util.find_spec("wonderwords")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "assets")
    for place in places:
        if all((place / name).is_file() for name in _FILES):
            lists = [[line.strip() for line in _read(place / name).split("\n")] for name in _FILES]
            nouns, adjectives, verbs = (tuple(word for word in each if word) for each in lists)
            return Words(nouns, adjectives, verbs, own=False)
    made = made_up(8800)
    return Words(made[:6800], made[6800:7750], made[7750:], own=True)


def sentence_starts(text: str) -> list[int]:
    """Where sentences begin: behind . ! or ? with closing quotes and white space."""
    return [0, *(m.end() for m in re.finditer(r"[.!?][\"'”’)\]_]*\s+", text))]


@cache
def filler(sentences: int = 12_000) -> str:
    """Sentences that say little, about 800,000 characters; no numbers, no names of places."""
    rng = random.Random("kvcli:filler")
    made = []
    for i in range(sentences):
        parts = [rng.choice(part) for part in (_WHEN, _WHO, _DID, _WHAT, _HOW)]
        made.append(" ".join(parts) + (".\n" if i % 7 == 6 else ". "))
    return "".join(made).strip()


@cache
def made_up(n: int) -> tuple[str, ...]:
    """n different words of two or three syllables that no dictionary has on purpose."""
    rng = random.Random("kvcli:words")
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3, 3))))
              + rng.choice(("", "n", "r", "l", "st", "m"))] = None  # fmt: skip
    return tuple(found)


@cache
def _split(text: str) -> list[str]:
    return text.split()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise KvcliError(f"cannot read {path}: {e}", given=str(path), fix="save it as UTF-8 text") from e


def _list(text: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in text.split("|"))


_WHEN = _list(
    "In the morning | Towards evening | A little later | On most days | After the rain | Before supper | "
    "That winter | Now and then | By the end of the week | Early in spring | Without much talk | "
    "As everyone expected | Some time ago | On the way home | During the break | Once the bell had rung | "
    "While the kettle boiled | For a whole season"
)
_WHO = _list(
    "the gardener | an old neighbour | the two cousins | a tall visitor | the baker's daughter | the ferryman | "
    "my uncle | the new teacher | a quiet clerk | the shepherd | the choir | a group of walkers | the postman | "
    "somebody's aunt | the carpenter | a young painter | the librarian | the night guard | a retired captain | "
    "the children | the cook | the man at the counter | a friend of the family | the woman with the basket"
)
_DID = _list(
    "looked for | carried away | talked about | repaired | forgot | admired | cleaned | borrowed | described | "
    "noticed | put aside | wrapped up | counted | asked for | kept | moved | painted | returned | waited for | "
    "listened to"
)
_WHAT = _list(
    "the wooden chair | a bundle of letters | the long fence | an empty bottle | the blue curtain | "
    "a basket of pears | the broken clock | a map of the valley | the smallest boat | a pair of boots | "
    "the garden gate | a heavy book | the copper kettle | an unfinished song | the kitchen window | "
    "a row of lamps | the last train | a woollen coat | the narrow staircase | a loaf of bread"
)
_HOW = _list(
    "and nobody minded | with great care | as if it were new | without a word | near the river | "
    "in spite of the cold | for no clear reason | because it was late | and went on walking | "
    "under the old tree | before the others came | though it hardly mattered | with a short laugh | "
    "in the usual manner | at the end of the lane | and then sat down | to everyone's surprise | "
    "until the light failed"
)
