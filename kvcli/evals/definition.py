"""tasks/NAME.yaml to a Task: every key known, every value of its type, messages with file and line."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvcli.config import read_yaml
from kvcli.errors import KvcliError
from kvcli.evals import plugin
from kvcli.evals.rows import RowTask
from kvcli.evals.schema import BadValue, build, convert, fill, hints_of, unknown_key
from kvcli.evals.scorers import Metric
from kvcli.evals.spec import Task


@dataclass(frozen=True)
class Generation:
    """`generation_kwargs`; whether answers are drawn is the user's choice, so it may only name greedy decoding."""

    until: tuple[str, ...] | None = None
    max_gen_toks: int = 256
    do_sample: Literal[False] = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_gen_toks < 1:
            raise ValueError("max_gen_toks must be at least 1")
        if self.temperature:
            raise ValueError("temperature must be 0: --temperature sets it for a run")


@dataclass(frozen=True)
class Metadata:
    """lm-evaluation-harness keeps a task's version here."""

    version: str | None = None


UNSTATED = (Metric("exact_match"),)
"""`metric_list` where a definition has none."""


@dataclass(frozen=True)
class Common:
    """The keys every definition may have; those of the task's class come on top."""

    task: str
    version: str | None = None
    metadata: Metadata = field(default_factory=Metadata)
    ability: str = "other"
    builder: str | None = None
    num_fewshot: int = 0
    output_type: Literal["generate_until", "multiple_choice"] = "generate_until"
    generation_kwargs: Generation = field(default_factory=Generation)
    metric_list: tuple[Metric, ...] = UNSTATED
    chance: float | None = None
    harmful: bool = False
    chat: bool = True
    reference: dict[str, Any] = field(default_factory=dict)
    suites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.task):
            raise BadValue(f"'task: {self.task}' is not a task name", "use letters, digits and underscores")
        if self.num_fewshot < 0:
            raise BadValue("'num_fewshot' cannot be negative", "write num_fewshot: 0")
        if self.chance is not None and not 0 <= self.chance <= 1:
            raise BadValue("'chance' must be between 0 and 1", "write the share that guessing gets right")
        if not self.metric_list:
            raise BadValue("'metric_list' is empty", "write metric_list: [{metric: exact_match}]")


@dataclass(frozen=True)
class Definition:
    """One YAML file: its values, and the line of each top-level key for messages."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def error(self, fault: BadValue) -> KvcliError:
        """The message with file and line; the line is that of the first top-level key the fault names."""
        named = re.findall(r"'([A-Za-z_]\w*)", str(fault))
        line = next((self.lines[n] for n in named if n in self.lines), None)
        where = str(self.path) if line is None else f"{self.path}:{line}"
        return KvcliError(f"{where}: {fault}", given=str(self.path), fix=fault.fix)


def read_definition(path: Path) -> Definition:
    values = read_yaml(path)
    return Definition(path, values, _key_lines(path))


def make_task(definition: Definition) -> Task:
    """The task of a definition. Raises KvcliError naming file and line."""
    try:
        return _make(definition)
    except BadValue as fault:
        raise definition.error(fault) from fault


def _make(definition: Definition) -> Task:
    names = [f.name for f in dataclasses.fields(Common)]
    common: Common = fill(Common, {k: v for k, v in definition.values.items() if k in names}, "")
    folder = definition.path.parent
    cls = RowTask if common.builder is None else _builder(common.builder, folder)
    own = _own_values(cls, names, definition.values)
    code = [c for c in (common.builder, own.get("scorer")) if c and ":" in c]
    facts = _facts(common, own) | own
    facts |= {"source": str(definition.path.resolve()), "digest": _digest(definition.path, code)}
    task: Task = build(cls, facts, "")
    return task


def _facts(common: Common, own: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Task. Without `until`, rows stop at the shots' delimiter, as in lm-evaluation-harness."""
    until = common.generation_kwargs.until
    if until is None:
        until = (own["fewshot_delimiter"],) if "fewshot_delimiter" in own else ()
    return {
        "name": common.task,
        "version": common.version or common.metadata.version or "1",
        "ability": common.ability,
        "metric": _metric(common, own),
        "shots": common.num_fewshot,
        "max_new_tokens": common.generation_kwargs.max_gen_toks,
        "until": until,
        "output_type": common.output_type,
        "chance": common.chance,
        "harmful": common.harmful,
        "chat": common.chat,
        "reference": published(common.reference, common.num_fewshot),
        "suites": common.suites,
    }


def _metric(common: Common, own: Mapping[str, Any]) -> str:
    """What the score is called: as stated, else after the scorer that gives it."""
    if common.metric_list is not UNSTATED:
        return common.metric_list[0].metric
    if common.output_type == "multiple_choice":
        return "acc"
    return str(own.get("scorer", UNSTATED[0].metric)).rpartition(":")[2]


def published(reference: Mapping[str, Any], usual: int) -> dict[str, dict[int, float]]:
    """`reference` as model -> shots -> score; a score alone is one of the usual number of shots. Raises BadValue."""
    return {
        model: {
            _shots(shots, model): _share(score, f"reference.{model}.{shots}")
            for shots, score in (value if isinstance(value, dict) else {usual: value}).items()
        }
        for model, value in reference.items()
    }


def _shots(value: Any, model: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fix = f"write reference: {{{model}: {{8: 0.5}}}} for 0.5 with 8 shots"
        raise BadValue(f"'reference.{model}': {value!r} is not a number of shots", fix)
    return value


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadValue(
            f"'{name}' must be a score between 0 and 1, not {value!r}", "write a published score, 0.5 for 50 %"
        )
    return float(value)


def _own_values(cls: type[Task], common: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields a task class adds to Task, from the keys of the same names."""
    base = {f.name for f in dataclasses.fields(Task)}
    own = {f.name: f for f in dataclasses.fields(cls) if f.name not in base}
    for key in values:
        if key not in own and key not in common:
            raise unknown_key(str(key), {*own, *common})
    out: dict[str, Any] = {}
    for name, spec in own.items():
        if name in values:
            out[name] = convert(values[name], hints_of(cls)[name], name)
        elif spec.default is not dataclasses.MISSING:
            out[name] = spec.default
        elif spec.default_factory is dataclasses.MISSING:
            raise BadValue(f"'{name}' is missing", f"add a line {name}: ...")
    return out


def _builder(text: str, folder: Path) -> type[Task]:
    cls = plugin.load_object(text, folder)
    if not (isinstance(cls, type) and issubclass(cls, Task) and dataclasses.is_dataclass(cls)):
        raise BadValue(f"'builder: {text}' is not a task", "a frozen dataclass derived from kvcli.evals.spec.Task")
    return cls


def _digest(path: Path, code: list[str]) -> str:
    """Hash over the definition and the files of code it names."""
    files = [path, *(plugin.split(text, path.parent)[0] for text in code)]
    joined = "".join(plugin.file_digest(file) for file in files)
    return hashlib.sha256(joined.encode()).hexdigest()[:12]


def _key_lines(path: Path) -> dict[str, int]:
    """Line of each top-level key. Raises KvcliError for a key written twice, which YAML would pass in silence."""
    import yaml

    quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=quick)
    lines: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else []:
        line = key.start_mark.line + 1
        if key.value in lines:
            what = f"{path}:{line}: '{key.value}' is written twice, first in line {lines[key.value]}"
            raise KvcliError(what, given=str(path), fix="keep one of them")
        lines[key.value] = line
    return lines
