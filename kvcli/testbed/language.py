"""Episodes of the testbed language: eight families of prompts with shots and a determinable answer.

An episode is `<bos> [family] header shot*`; a shot is a question, its answer and `<e>`. The last shot's question is a
test prompt's end. In training every shot counts; a token whose value cannot be known from the text before it (a key
seen for the first time) is marked unknown and not trained on. `docs/testbed.md` says what each family stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from kvcli.testbed import vocabulary as V

MAX_NUMBER = 15
Builder = Callable[[Random, int, "int | None", bool, "Dialect"], "Episode"]


@dataclass(frozen=True)
class Dialect:
    """How hard episodes are: operators an arithmetic episode may have, and the share of its words that shots of another
    family may take (`DISTRACTORS`), which no answer needs."""

    operators: int = 8
    distractors: float = 0.0


PLAIN = Dialect()


@dataclass
class Shot:
    question: list[str]
    answer: list[str]
    known: list[bool]
    """known[i]: answer[i] follows from the text before it."""


@dataclass
class Episode:
    family: str
    header: list[str] = field(default_factory=list)
    header_region: str = "context"
    shots: list[Shot] = field(default_factory=list)

    def ask(self, question: list[str], answer: list[str], known: list[bool] | None = None) -> None:
        self.shots.append(Shot(question, answer, known or [True] * len(answer)))

    def __len__(self) -> int:
        return 2 + len(self.header) + sum(len(s.question) + len(s.answer) + 1 for s in self.shots)

    def tokens(self) -> tuple[list[str], list[bool]]:
        """All words, and which of them are answer words to be learned."""
        words, learn = [V.BOS, V.TAG[self.family], *self.header], [False] * (2 + len(self.header))
        for shot in self.shots:
            words += [*shot.question, *shot.answer, V.END]
            learn += [False] * len(shot.question) + shot.known + [True]
        return words, learn


def _filler(rng: Random, n: int) -> list[str]:
    return [rng.choice(V.FILLER) for _ in range(n)]


def _cuts(rng: Random, total: int, pieces: int) -> list[int]:
    """`pieces` random lengths that add up to at most `total` (the rest stays behind the last)."""
    marks = sorted(rng.randint(0, max(0, total)) for _ in range(pieces))
    return [b - a for a, b in zip([0, *marks], marks, strict=False)]


def _layout(rng: Random, length: int, used: int, size: int, shots: int | None) -> tuple[int, list[list[str]]]:
    """How many shots of about `size` words fit into `length`, and the filler before each.

    shots=None (training): as many as fit without filler, or 1 to 12 with filler.
    """
    room = max(size, length - used)
    most = max(1, room // size)
    if shots is None:
        shots = most if rng.random() < 0.55 else rng.randint(1, 12)
    n = max(1, min(shots, most))
    spare = max(0, room - n * size) if n < most else 0
    marks = [*sorted(rng.randint(0, spare) for _ in range(n - 1)), spare]
    return n, [_filler(rng, b - a) for a, b in zip([0, *marks], marks, strict=False)]


def _last(n: int) -> Iterator[tuple[int, bool]]:
    for i in range(n):
        yield i, i == n - 1


def _options(rng: Random, pool: list[str], right: str) -> tuple[list[str], str]:
    options = [*rng.sample([p for p in pool if p != right], 3), right]
    rng.shuffle(options)
    words = ["opt"]
    for letter, option in zip(V.LETTERS, options, strict=True):
        words += [letter, option]
    return words, V.LETTERS[options.index(right)]


def knowledge(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Multiple choice on facts stored in the weights; only its own options must stay in the cache."""
    episode = Episode("knowledge")
    n, fill = _layout(rng, length, 2, 14, shots)
    for i in range(n):
        relation = rng.choice(list(V.FACTS))
        entity = rng.choice(V.ENTITIES)
        value = V.FACTS[relation][entity]
        options, letter = _options(rng, V.ATTRIBUTES[relation], value)
        episode.ask([*fill[i], *options, relation, entity], [value, letter])
    return episode


def choice(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Multiple choice on a key -> value map that exists only in the episode's earlier shots."""
    episode = Episode("choice")
    n, fill = _layout(rng, length, 2, 14, shots)
    size = rng.randint(2, max(2, min(12, n * 2 // 3)))
    mapping = dict(zip(rng.sample(V.KEYS, size), rng.sample(V.VALUES, size), strict=True))
    seen: list[str] = []
    for i, last in _last(n):
        new = [k for k in mapping if k not in seen]
        fresh_key = bool(new) and not last and (not seen or rng.random() < 0.6)
        key = rng.choice(new) if fresh_key else rng.choice(seen or list(mapping))
        pool = list(mapping.values()) if size >= 4 and rng.random() < 0.5 else V.VALUES
        options, letter = _options(rng, pool, mapping[key])
        episode.ask([*fill[i], *options, "pick", key], [mapping[key], letter], [key in seen, True])
        if key not in seen:
            seen.append(key)
    return episode


def _notes(rng: Random, room: int, pairs: int, spread: bool) -> tuple[list[str], dict[str, str]]:
    """`pairs` facts 'note k v' with filler between them, about `room` words in all."""
    mapping = {k: rng.choice(V.VALUES) for k in rng.sample(V.KEYS, pairs)}
    spare = room - 3 * pairs if spread or rng.random() < 0.6 else 0
    words: list[str] = []
    for (key, value), gap in zip(mapping.items(), _cuts(rng, spare, pairs), strict=True):
        words += [*_filler(rng, gap), "note", key, value]
    return words, mapping


def recall(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Associative recall: one of many key-value notes of a passage."""
    testing = shots is not None
    room = int((length - 6 - 4 * shots) * 0.8) if shots is not None else int((length - 6) * rng.uniform(0.2, 0.8))
    pairs = max(2, min(48, room // 3, 32 if testing else rng.choice([3, 6, 12, 24, 48])))
    header, notes = _notes(rng, room, pairs, testing)
    episode = Episode("recall", header)
    n, fill = _layout(rng, length, 2 + len(header), 4, shots)
    used: set[str] = set()
    for i, last in _last(n):
        key = rng.choice([k for k in notes if not (fresh and last) or k not in used])
        used.add(key)
        episode.ask([*fill[i], "ask", key], [notes[key]])
    return episode


def _apply(meaning: str, a: int, b: int) -> int:
    return {"add": a + b, "sub": a - b, "max": max(a, b), "min": min(a, b)}[meaning]


def _chain(
    rng: Random, operators: list[str], meaning: dict[str, str], steps: int
) -> tuple[list[str], list[list[str]], list[str]]:
    """A start number and `steps` operators whose results stay in 0..MAX_NUMBER: question, worked steps, operators."""
    while True:
        value = rng.randint(0, MAX_NUMBER)
        question, worked, used = ["start", str(value)], [], []
        for operator in rng.sample(operators, steps):
            operand = rng.randint(1, 6)
            result = _apply(meaning[operator], value, operand)
            if not 0 <= result <= MAX_NUMBER:
                break
            question += [operator, str(operand)]
            worked.append([operator, meaning[operator], str(value), str(operand), str(result)])
            used.append(operator)
            value = result
        else:
            return [*question, "go"], worked, used


def arithmetic(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Chain of thought with operators whose meaning only earlier shots show: per step the operator, its meaning, the
    accumulator, the operand and the result; then '# result'."""
    episode = Episode("arithmetic")
    n, fill = _layout(rng, length, 2, 20, shots)
    operators = rng.sample(V.OPERATORS, rng.randint(2, max(2, min(dialect.operators, 1 + n * 2 // 3))))
    meaning = {operator: rng.choice(V.MEANINGS) for operator in operators}
    seen: list[str] = []
    for i, last in _last(n):
        pool = seen if last and len(seen) >= 2 else operators
        question, worked, used = _chain(rng, pool, meaning, 2)
        answer = [word for step in worked for word in step] + ["#", worked[-1][-1]]
        known = [k for operator in used for k in (True, operator in seen, True, True, True)] + [True, True]
        episode.ask([*fill[i], *question], answer, known)
        seen += [operator for operator in used if operator not in seen]
    return episode


def code(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Assignments as in a REPL; variables persist over shots; the answer follows the references to the number."""
    episode = Episode("code")
    free = rng.sample(V.KEYS, len(V.KEYS))
    value: dict[str, str] = {}
    chain: dict[str, list[str]] = {}
    n, fill = _layout(rng, length, 2, 12, shots)
    for i, last in _last(n):
        question: list[str] = []
        for _ in range(0 if last and value else rng.randint(1, 3)):
            if not free:
                break
            name = free.pop()
            short = [other for other in value if len(chain[other]) <= 1]
            if short and rng.random() < 0.4:
                other = rng.choice(short)
                value[name], chain[name] = value[other], [other, *chain[other]]
                question += ["let", name, other]
            else:
                value[name], chain[name] = rng.choice(V.NUMBERS), []
                question += ["let", name, value[name]]
        name = rng.choice(list(value))
        episode.ask([*question, *fill[i], "print", name], [*chain[name], value[name]])
    return episode


def safety(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """A rule at the very start names forbidden topics; the topic of an item is in the weights: refuse or comply."""
    banned = rng.sample(V.TOPICS, rng.randint(1, 5))
    allowed = [t for t in V.TOPICS if t not in banned]
    header = ["rule", *(word for topic in banned for word in ("never", topic))]
    episode = Episode("safety", header, header_region="system")
    target = rng.choice(banned if rng.random() < 0.5 else allowed) if fresh else None
    n, fill = _layout(rng, length, 2 + len(header), 5, shots)
    for i, last in _last(n):
        bad, good = [t for t in banned if t != target], [t for t in allowed if t != target]
        topic = rng.choice((bad or good) if rng.random() < 0.5 else (good or bad))
        if fresh and last and target is not None:
            topic = target
        item = rng.choice([it for it in V.ITEMS if V.TOPIC_OF[it] == topic])
        half = len(fill[i]) // 2
        question = [*fill[i][:half], "user", *fill[i][half:], item]
        episode.ask(question, [topic, "refuse" if topic in banned else "comply"])
    return episode


def needle(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Secrets of three words hidden in filler."""
    width = 3
    n = 4 if shots is not None else rng.randint(1, max(1, min(8, length // 24)))
    keys, values = rng.sample(V.KEYS, n), rng.sample(V.VALUES, n * width)
    secrets = {key: values[i * width : (i + 1) * width] for i, key in enumerate(keys)}
    asked = shots if shots is not None else max(1, min(2 * n, length // 16))
    body = max(0, length - 2 - asked * 6 - n * 5)
    header: list[str] = []
    gaps = _cuts(rng, body, n)
    for key, gap in zip(keys, gaps, strict=True):
        header += [*_filler(rng, gap), "secret", key, *secrets[key]]
    episode = Episode("needle", [*header, *_filler(rng, body - sum(gaps))])
    used: set[str] = set()
    for _, last in _last(asked):
        pool = [k for k in keys if k not in used] if fresh and last else keys[1:] if fresh else keys
        key = rng.choice(pool)
        used.add(key)
        episode.ask(["recall", key], secrets[key])
    return episode


def longgen(rng: Random, length: int, shots: int | None, fresh: bool, dialect: Dialect = PLAIN) -> Episode:
    """Long generation: ten look-ups answered in one go, each key restated before its value."""
    ask, shown = 10, 4
    if shots is not None:
        room = length - 6 - 3 * ask - (3 * shown + 3) * (shots - 1)
        pairs = min(room // 3, 32)
        if pairs < ask:
            return Episode("longgen")
    else:
        room = int((length - 6) * rng.uniform(0.3, 0.6))
        pairs = max(3, min(40, room // 3, rng.choice([3, 6, 12, 24, 40])))
    header, notes = _notes(rng, room, pairs, shots is not None)
    episode = Episode("longgen", header)
    todo = None if shots is None else [shown] * (shots - 1) + [ask]
    while todo is None or todo:
        left = (length - len(episode) - 3) // 3
        count = todo.pop(0) if todo else min(rng.randint(1, 12), pairs, left)
        if count < 1:
            break
        keys = rng.sample(list(notes), min(count, pairs))
        episode.ask(["all", *keys, "go"], [word for key in keys for word in (key, notes[key])])
    return episode


BUILDERS: dict[str, Builder] = {
    "knowledge": knowledge, "choice": choice, "recall": recall, "arithmetic": arithmetic,
    "code": code, "safety": safety, "needle": needle, "longgen": longgen,
}  # fmt: skip


# Families whose shots need no header, stand for themselves, and share no word to look up with the family they disturb.
DISTRACTORS: dict[str, tuple[str, ...]] = dict.fromkeys(V.FAMILIES, ("knowledge", "arithmetic"))
DISTRACTORS.update(knowledge=("choice", "arithmetic"), arithmetic=("knowledge", "choice"))


def _disturb(rng: Random, episode: Episode, other: Episode) -> None:
    """Puts the other's shots, in their order, at random places before the last shot."""
    places = sorted(rng.randrange(len(episode.shots)) for _ in other.shots)
    for moved, (place, shot) in enumerate(zip(places, other.shots, strict=True)):
        episode.shots.insert(place + moved, shot)


def training_episode(rng: Random, family: str, length: int, dialect: Dialect = PLAIN) -> Episode:
    """An episode of about `length` words with a random number of shots; half have distractors, if there are any."""
    other = 0
    if dialect.distractors and rng.random() < 0.5:
        other = int(length * rng.uniform(0.1, dialect.distractors))
    episode = BUILDERS[family](rng, length - other, None, False, dialect)
    if other and episode.shots:
        _disturb(rng, episode, BUILDERS[rng.choice(DISTRACTORS[family])](rng, other, None, False, dialect))
    return episode


def exam_episode(
    rng: Random, family: str, length: int, shots: int, dialect: Dialect = PLAIN, tries: int = 200
) -> Episode:
    """An episode of about `length` words whose last question is new and whose answer can be known from the prompt.

    The last of its shots is the question under test, so `shots` exemplars need `shots + 1` questions; a share
    `dialect.distractors` of the exemplars, rounded, is of another family.
    Raises ValueError when no such episode is found (too many shots for the length, or too few to show the answer).
    """
    strange = round(shots * dialect.distractors)
    other = int(length * dialect.distractors) if strange else 0
    own = shots - strange + 1
    for _ in range(tries):
        episode = BUILDERS[family](rng, length - other, own, True, dialect)
        whole = len(episode.shots) == own and all(episode.shots[-1].known)
        if whole and strange:
            aside = BUILDERS[rng.choice(DISTRACTORS[family])](rng, other, strange, False, dialect)
            whole = len(aside.shots) == strange
            _disturb(rng, episode, aside)
        if whole and len(episode) <= length + 40:
            return episode
    raise ValueError(f"no {family} prompt of {length} tokens with {shots} shots has a determinable answer")
