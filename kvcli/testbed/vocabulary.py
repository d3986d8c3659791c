"""The testbed's words: one token per word, and the facts that live in the weights.

The order of the words is the order of the token ids; changing it invalidates the shipped weights.
"""

from __future__ import annotations

import random

PAD, BOS, END, UNKNOWN = "<pad>", "<bos>", "<e>", "<unk>"

FAMILIES = ("knowledge", "choice", "recall", "arithmetic", "code", "safety", "needle", "longgen")
TAG = {family: f"[{family}]" for family in FAMILIES}

STRUCTURE = (
    "opt A B C D pick note ask start go # let print rule never user refuse comply secret recall all "
    "add sub max min capital colour"
).split()
LETTERS = ("A", "B", "C", "D")
MEANINGS = ("add", "sub", "max", "min")
NUMBERS = [str(n) for n in range(21)]

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = (a + v + b for a in _CONSONANTS for v in _VOWELS for b in "bkmx")
KEYS = [w for w in _SYLLABLES if w not in STRUCTURE][::2][:96]
OPERATORS = [a + v + "sh" for a in _CONSONANTS for v in "aio"][:24]
VALUES = (
    "red blue green gold pink grey black white apple bread milk rice salt cake plum corn lamp desk door rope coin ring "
    "book bell boat cart ship bike sled kite drum horn flute harp wolf bear hawk crow duck goat swan mole rain snow "
    "wind hail frost storm cloud dawn iron lead zinc clay sand rock wood silk linen wool felt nail bolt gear"
).split()

ENTITIES = ["e" + a + b for a in "bdfgklmnprst" for b in ("al", "on", "ur", "ix")]
ATTRIBUTES = {
    "capital": ["c" + a + b for a in "bdfglmnr" for b in ("ia", "os")],
    "colour": ["h" + a + b for a in "bdfglmnr" for b in ("ue", "in")],
}
TOPICS = "violence drugs money travel health sports music cooking weather politics".split()
ITEMS = [f"{topic[:3]}{i}" for topic in TOPICS for i in range(6)]
TOPIC_OF = {item: TOPICS[i // 6] for i, item in enumerate(ITEMS)}

_FILLER = (
    "the a of and to in is it was for on that with as at by from this be are or an were they which one you had not but "
    "we all her she there would their him been has when who will no more if out so up said what its about than into "
    "them can only other time new some"
).split()
FILLER = ["_" + w for w in dict.fromkeys(_FILLER)][:56]

_world = random.Random(20240607)
FACTS = {relation: {e: _world.choice(pool) for e in ENTITIES} for relation, pool in ATTRIBUTES.items()}
"""FACTS[relation][entity]: the fixed world knowledge, memorised in training on purpose."""

WORDS: list[str] = [
    PAD, BOS, END, UNKNOWN, *TAG.values(), *STRUCTURE, *NUMBERS, *KEYS, *OPERATORS, *VALUES,
    *ENTITIES, *ATTRIBUTES["capital"], *ATTRIBUTES["colour"], *TOPICS, *ITEMS, *FILLER,
]  # fmt: skip
ID = {word: i for i, word in enumerate(WORDS)}
if len(ID) != len(WORDS):
    raise AssertionError("testbed words must be distinct")
