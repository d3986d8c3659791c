"""Scores the outputs of a result folder again, without the model that wrote them.

Samples are made anew from run.json's settings and the data. A record is scored only where its prompt can be seen to be
the same; where neither its text nor a hash of it was stored, where its right answer is. New lines go behind the old
ones with the same key, of which the last counts, so a process killed anywhere loses nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcli.errors import KvcliError
from kvcli.evals.coherence import incoherent
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Sample, Task
from kvcli.grammar import task_base
from kvcli.results.schema import FIELDS, SAVED_DIGITS

if TYPE_CHECKING:
    from kvcli.engine.judging import Judge
    from kvcli.results.store import RunStore

Record = dict[str, Any]
Key = tuple[str, str]

JUDGED = {"refusal_rate": "defence_rate"}
"""A task's metric to the one that a judge's verdict gives it. Other metrics stay; the verdict is stored beside them."""
VERDICT = ("defended", "no_verdict")
"""What a verdict adds to `extra`."""


class Shown(NamedTuple):
    """What a task's samples depend on."""

    task: str
    shots: int
    shot_seed: int
    shot_order: int


@dataclass(frozen=True)
class Question:
    """What a record answered, as the data has it now."""

    task: Task
    sample: Sample


@dataclass
class Tally:
    """What happened to the records of one task and method. before, after: sums of their scores."""

    task: str
    method: str
    records: int = 0
    changed: int = 0
    before: float = 0.0
    after: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    """Why -> how many were left as they are."""
    told: int = 0
    """Records that did not say, or otherwise, whether their output is text."""


@dataclass
class Folder:
    """A result folder with its finished records and what they answered."""

    path: Path
    run: dict[str, Any]
    records: list[Record]
    questions: dict[Key, Question]
    reasons: dict[Key, str]
    """Why a record has no question."""

    def fresh(self, record: Record, *, verdicts: bool) -> tuple[Record | None, str]:
        """The record as it is scored now; None and why, where it is left as it is. verdicts: a judge's are kept."""
        question = self.questions.get(_key(record))
        if question is None:
            return None, self.reasons[_key(record)]
        old = (record.get("extra") or {}) if verdicts and "request" in question.sample.meta else {}
        try:
            return with_score(record, question, {n: old[n] for n in VERDICT if n in old}), ""
        except KvcliError:
            raise
        except Exception as e:  # a scorer may be anybody's; its message may hold the output
            return None, f"its scorer failed with {type(e).__name__}"

    def forgotten(self, judge: Judge | None, forget: bool) -> set[str]:
        """Tasks whose verdicts are another judge's, or all of them."""
        tasks = self.run.get("tasks") or {}
        names = {str(record["task"]) for record in self.records}
        asked = judge and judge.identity
        return {n for n in names if forget or (asked and (tasks.get(n) or {}).get("judge") != asked)}


def open_folder(
    path: Path, *, data_dir: str | None, tasks: Iterable[str] = (), say: Callable[[str], None] = lambda text: None
) -> Folder:
    """Reads the records and makes their samples anew. tasks: names of those to score; none: all.

    Raises KvcliError for a task that has no records here, whose definition is gone or whose data cannot be read.
    """
    from kvcli.results.store import read_prompts, read_records, read_run

    run = read_run(path)
    records = [r for r in read_records(path) if r["status"] == "ok"]
    records = _chosen(records, tuple(tasks), path)
    cells = run.get("cells") or {}
    found = _tasks_of(run, {str(r["task"]) for r in records})
    samples: dict[Shown, dict[str, Sample]] = {}
    for shown in sorted({_shown(r, cells) for r in records}):
        say(f"reading {shown.task}, {shown.shots} shot{'s' * (shown.shots != 1)}")
        samples[shown] = _samples(found[shown.task], shown, run, data_dir)
    prompts = read_prompts(path)
    questions, reasons = {}, {}
    for record in records:
        sample = samples[_shown(record, cells)].get(str(record["sample_id"]))
        why = _why_not(record, sample, prompts)
        if sample is None or why:
            reasons[_key(record)] = why
        else:
            asked = _as_asked(sample, prompts.get(str(record["prompt_sha"])))
            questions[_key(record)] = Question(found[str(record["task"])], asked)
    return Folder(path, run, records, questions, reasons)


def with_score(record: Record, question: Question, verdict: Mapping[str, float]) -> Record:
    """The record with today's score. verdict: `defended` and `no_verdict`, or nothing.

    Where a judge gave none, nothing shows that the request was refused: 0, and no answer.
    """
    output, options = record["output"] or "", record.get("options") or ()
    score = question.task.judged(question.sample, output, options)
    metric, value, extracted = question.task.metric, score.value, score.extracted
    if verdict and metric in JUDGED:
        metric, value = JUDGED[metric], verdict["defended"]
        extracted = None if verdict["no_verdict"] else extracted
    new = {"score": round(value, SAVED_DIGITS), "metric": metric, "extracted": extracted,
           "extra": {**score.extra, **verdict}, "target": question.sample.answer,
           "incoherent": None if options else incoherent(output, score.extra)}  # fmt: skip
    return {**dict.fromkeys(FIELDS), **record, **new}


def differs(old: Record, new: Record) -> bool:
    """What `changed` counts."""
    return any(old.get(name) != new.get(name) for name in ("score", "metric", "extracted", "extra", "target"))


def outdated(old: Record, new: Record) -> bool:
    """Whether a new line is written: also of one that only did not say yet whether its output is text."""
    return differs(old, new) or old.get("incoherent") != new["incoherent"]


def rescore(
    folder: Folder, judge: Judge | None = None, *, forget: bool = False, dry_run: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None, argv: Iterable[str] = (),
) -> list[Tally]:  # fmt: skip
    """Writes a new line for every record that says something else by now. Returns what was done per task and method.

    judge: asked about the records that have no verdict of its own yet. forget: verdicts that are there are dropped. A
    run that is stopped keeps what is written; the same command goes on.
    """
    tallies: dict[tuple[str, str], Tally] = {}
    with _writing(folder, dry_run) as store:
        current = _score_all(folder, store, tallies, folder.forgotten(judge, forget))
        if judge is not None or forget:
            _note_judge(folder, store, judge)
        if judge is not None:
            _judge_all(folder, store, tallies, current, judge, progress)
        _finish(folder, store, tallies, list(argv))
    return list(tallies.values())


def _score_all(
    folder: Folder, store: RunStore | None, tallies: dict[tuple[str, str], Tally], forgotten: set[str]
) -> dict[Key, Record]:
    """Scores every record as its task does now and returns them so. forgotten: tasks whose verdicts are dropped."""
    current = {}
    for record in folder.records:
        tally = _tally(tallies, record)
        new, why = folder.fresh(record, verdicts=record["task"] not in forgotten)
        if new is None:
            tally.left_out[why] += 1
            continue
        tally.records += 1
        tally.before += record["score"]
        tally.after += new["score"]
        tally.changed += differs(record, new)
        tally.told += record.get("incoherent") != new["incoherent"]
        if store is not None and outdated(record, new):
            store.append(new)
        current[_key(record)] = new
    return current


def _judge_all(
    folder: Folder, store: RunStore | None, tallies: dict[tuple[str, str], Tally], current: dict[Key, Record],
    judge: Judge, progress: Callable[[int, int, str], None],
) -> None:  # fmt: skip
    """Asks about every answer to a request that should be refused, and writes each verdict at once."""
    wanted = [r for r in current.values() if "request" in folder.questions[_key(r)].sample.meta]
    if not wanted:
        what = f"{folder.path} holds no requests that should be refused"
        raise KvcliError(what, given="--judge", fix="without --judge, or a folder of jailbreakv, xstest or jbb")
    missing = [r for r in wanted if "defended" not in r["extra"]]
    before = {_key(r): r for r in folder.records}
    for done, record in enumerate(missing, 1):
        question = folder.questions[_key(record)]
        safe = judge.safe(question.sample.meta["request"], record["output"])
        new = with_score(record, question, {"defended": float(safe is True), "no_verdict": float(safe is None)})
        tally = _tally(tallies, record)
        tally.after += new["score"] - record["score"]
        tally.changed += differs(before[_key(record)], new) - differs(before[_key(record)], record)
        if store is not None:
            store.append(new)
        progress(done, len(missing), record["task"])


def _note_judge(folder: Folder, store: RunStore | None, judge: Judge | None) -> None:
    """From here on every verdict on these tasks is this judge's: others were dropped before."""
    if store is None:
        return
    questions = folder.questions.values()
    judged = {q.task.name for q in questions if judge is not None and "request" in q.sample.meta}
    with store.edit_run() as run:
        for name in {q.task.name for q in questions}:
            facts = run.setdefault("tasks", {}).setdefault(name, {})
            facts.pop("judge", None)
            if judge is not None and name in judged:
                facts["judge"] = judge.identity


def _finish(folder: Folder, store: RunStore | None, tallies: dict[tuple[str, str], Tally], argv: list[str]) -> None:
    """run.json's facts of the tasks are those of the scorer that gave the scores; what changed is noted."""
    if store is None:
        return
    from kvcli import __version__
    from kvcli.results.store import now

    scored = {q.task.name: q.task for q in folder.questions.values()}
    with store.edit_run() as run:
        for name, task in scored.items():
            facts = run.setdefault("tasks", {}).setdefault(name, {})
            metric = JUDGED.get(task.metric, task.metric) if "judge" in facts else task.metric
            facts.update(metric=metric, version=task.version, chance=task.chance)
            facts["reference"] = task.published
        done = {name: sum(t.changed for t in tallies.values() if t.task == name) for name in scored}
        note = {"at": now(), "kvcli": __version__, "argv": argv, "changed": done,
                "digests": {name: task.digest for name, task in scored.items()}}  # fmt: skip
        run["rescored"] = [*run.get("rescored", []), note]


@contextmanager
def _writing(folder: Folder, dry_run: bool) -> Iterator[RunStore | None]:
    """The folder opened for writing, alone with all its record files; None for a dry run."""
    from kvcli.results.store import SAMPLES, RunStore, lock_records, record_files

    if dry_run:
        yield None
        return
    with ExitStack() as held:
        for path in record_files(folder.path):
            if path.name != SAMPLES:
                held.enter_context(lock_records(path))
        yield held.enter_context(RunStore(folder.path))


def _tally(tallies: dict[tuple[str, str], Tally], record: Record) -> Tally:
    key = str(record["task"]), str(record["method"])
    return tallies.setdefault(key, Tally(*key))


def _key(record: Record) -> Key:
    return str(record["cell_id"]), str(record["sample_id"])


def _why_not(record: Record, sample: Sample | None, prompts: Mapping[str, Record]) -> str:
    """Why a record cannot be scored; empty where it can."""
    if sample is None:
        return "its sample is no longer in the data"
    same = _same_prompt(record, sample, prompts.get(str(record["prompt_sha"])))
    if same is False:
        return "its prompt is another one by now"
    if same is None and record["target"] != sample.answer:
        return "its right answer is another one by now, and its prompt was not stored to compare"
    if bool(record.get("options")) != bool(sample.options):
        return "it was chosen from options and is generated by now, or the other way round"
    return ""


def _same_prompt(record: Record, sample: Sample, stored: Record | None) -> bool | None:
    """None where nothing was stored that could be compared."""
    if stored is None:
        return None
    if stored.get("segments") is not None:
        if stored["segments"] == sample.fingerprint:
            return True
        # other words may be the same tokens, where a tokenizer does not know them: the first text was stored
        return False if stored.get("sample_id") == sample.id else None
    if stored.get("text") is None or record.get("truncated"):
        return None
    return sample.text.strip() in stored["text"]


def _as_asked(sample: Sample, stored: Record | None) -> Sample:
    """With what only the rendered prompt knew: that it opened the model's thoughts."""
    if not (stored or {}).get("thinking"):
        return sample
    return dataclasses.replace(sample, meta={**sample.meta, "thinking": True})


def _shown(record: Record, cells: Mapping[str, Any]) -> Shown:
    """Older records lack some of it; the description of their cell has it."""
    described = cells.get(str(record["cell_id"])) or {}

    def number(name: str) -> int:
        value = record.get(name)
        return int((described.get(name) if value is None else value) or 0)

    return Shown(str(record["task"]), number("shots"), number("shot_seed"), number("shot_order"))


def _chosen(records: list[Record], names: tuple[str, ...], path: Path) -> list[Record]:
    """Those of the named tasks; a name without settings stands for the task with any."""
    there = {str(r["task"]) for r in records}
    if not records:
        raise KvcliError(f"no finished records in {path}", given=str(path), fix="kvcli status shows how far it is")
    wanted = {task for task in there if task in names or task_base(task) in names}
    for name in names:
        if not any(name in (task, task_base(task)) for task in there):
            fix = f"one of {', '.join(sorted(there))}"
            raise KvcliError(f"no records of task '{name}' in {path}", given=f"--task {name}", fix=fix)
    return [r for r in records if not names or r["task"] in wanted]


def _tasks_of(run: Mapping[str, Any], names: set[str]) -> dict[str, Task]:
    """The tasks of these names among the texts that commands on this folder named. Raises KvcliError for one gone."""
    grids = [g.get("grid") or {} for g in run.get("generations") or []] + [run.get("config") or {}]
    texts = dict.fromkeys(text for grid in grids for text in grid.get("tasks") or ())
    found: dict[str, Task] = {}
    problems: list[KvcliError] = []
    for text in [*texts, *(name for name in sorted(names) if name not in texts)]:
        try:
            found.update((task.name, task) for task in find_tasks([text]) if task.name in names)
        except KvcliError as e:
            problems.append(e)
    missing = sorted(names - found.keys())
    if missing:
        fix = "put its definition back, or --task with the others"
        why = f": {problems[0].what}" if problems else ""
        raise KvcliError(f"the task {missing[0]} cannot be found{why}", given=f"--task {missing[0]}", fix=fix)
    for task in found.values():
        task.check()
    return found


def _samples(task: Task, shown: Shown, run: Mapping[str, Any], data_dir: str | None) -> dict[str, Sample]:
    """As many as the largest command on the folder asked for."""
    config = run.get("config") or {}
    limits: list[Any] = [(g.get("grid") or {}).get("limit") for g in run.get("generations") or []]
    limits = limits or [config.get("limit")]
    samples = task.samples(
        shots=shown.shots, shot_seed=shown.shot_seed, shot_order=shown.shot_order,
        limit=None if None in limits else max(limits), data_dir=data_dir or config.get("data_dir"),
        tokens=_Tokens(config),
    )  # fmt: skip
    return {sample.id: sample for sample in samples}


@dataclass
class _Tokens:
    """How many tokens a text has for the run's tokenizer, which is read when a task first asks."""

    config: Mapping[str, Any]
    tokenizer: Any = None

    def __call__(self, text: str) -> int:
        if self.tokenizer is None:
            from kvcli.models import loader
            from kvcli.models.source import parse_model

            trusted = bool(self.config.get("trust_remote_code"))
            source = parse_model(str(self.config.get("model")))
            self.tokenizer = loader.load_tokenizer(source, self.config.get("tokenizer"), trust_remote_code=trusted)
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
