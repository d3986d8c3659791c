"""Finds tasks of lm-evaluation-harness by name: `--task lm_eval:NAME`. Reads definitions only, no data."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kvcli.config import stable_hash
from kvcli.errors import KvcliError, unknown
from kvcli.evals.harness import package
from kvcli.evals.harness.live import UNASKED
from kvcli.evals.harness.task import HarnessTask

PREFIX = "lm_eval:"
MAX_GEN_TOKS = 256
"""New tokens where a task says nothing: `DEFAULT_MAX_GEN_TOKS` of lm-eval's `defaults.py`."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Spellings of one setting, the first one counts: `normalize_gen_kwargs` of lm-eval's `models/utils.py`."""
_DEFAULT_METRICS = {"multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match",)}
"""`DEFAULT_METRIC_REGISTRY` of lm-eval's `api/registry.py`."""
_OVER_A_SET = {"f1", "mcc", "brier_score", "likelihood", "bleu", "chrf", "ter", "perplexity", "bypass"}
"""Metrics that lm-eval computes of all samples together: a single one has no value (`api/metrics.py`)."""

_NAMES = ("task", "group", "task_alias", "group_alias")
"""Keys of a group's member that say which it is and how it is shown."""

Leaf = tuple[str, dict[str, Any]]
"""What finds a task again behind the prefix, and its settings."""


def find(name: str) -> list[HarnessTask]:
    """The tasks behind `lm_eval:NAME`: one task, or all of a group or a tag.

    name: with or without the prefix; also the path of a task's own file, and GROUP/TASK for one task as its group sets
    it. Raises KvcliError where lm-eval is not installed, for a name it does not know and for a task that cannot be run
    through a compressed cache.
    """
    return [_task(*leaf) for leaf in _leaves(name.removeprefix(PREFIX))]


@cache
def _leaves(name: str) -> tuple[Leaf, ...]:
    package.version()
    if name.endswith((".yaml", ".yml")):
        return (_own_file(name),)
    group, slash, member = name.rpartition("/")
    if slash:
        leaves = {source.rpartition("/")[2]: (source, config) for source, config in _leaves(group)}
        if member not in leaves:
            raise unknown("task", member, leaves, given=f"--task {PREFIX}{name}", listing=f"lm-eval's {group}")
        return (leaves[member],)
    path = package.definition(name)
    settings = package.load_yaml(path, functions=False) if path is not None else {}
    if path is not None and settings.get("task") == name and not {"group", "class"} & set(settings):
        _check(name, settings)
        return ((name, _config(path, {})),)
    if name not in package.index():
        raise unknown("task", name, package.index(), given=f"--task {PREFIX}{name}", listing="lm_eval ls tasks")
    found = dict(_walk(name, {}, name))
    if not found:
        raise KvcliError(f"lm-eval's '{name}' has no tasks", given=f"--task {PREFIX}{name}", fix="another name")
    return tuple(found.items())


def _own_file(name: str) -> Leaf:
    path, given = Path(name).expanduser(), f"--task {PREFIX}{name}"
    if not path.is_file():
        raise KvcliError(f"no file {path}", given=given, fix="check the path; it is read from the current folder")
    config = _config(path, {})
    if not isinstance(config.get("task"), str):
        raise KvcliError(f"{path} defines no single task", given=given, fix="a file with a line task: NAME")
    _check(config["task"], config)
    return name, config


def _walk(name: str, overrides: Mapping[str, Any], asked: str) -> Iterator[Leaf]:
    """The tasks of an entry, as lm-eval's `tasks/_factory.py` goes through groups and tags."""
    entry = package.index()[name]
    kind = entry.kind.name
    if kind == "TAG":
        for member in sorted(entry.tags):
            yield from _walk(member, overrides, asked)
    elif kind == "GROUP":
        yield from _members(_config(entry.yaml_path, {}), overrides, asked)
    elif kind == "PY_TASK":
        raise _refused(name, "it is written as a Python class that builds its requests in a way of its own", asked)
    else:
        _check(name, {**entry.cfg, **overrides}, asked)  # before its functions are imported
        yield (f"{asked}/{name}" if overrides else name), _config(entry.yaml_path, overrides)


def _members(group: Mapping[str, Any], overrides: Mapping[str, Any], asked: str) -> Iterator[Leaf]:
    for item in group["task"] if isinstance(group["task"], list) else [group["task"]]:
        own = {} if isinstance(item, str) else {k: v for k, v in item.items() if k not in _NAMES}
        member = item if isinstance(item, str) else item.get("group", item.get("task"))
        if member in package.index():
            yield from _walk(member, {**overrides, **own}, asked)
        elif isinstance(item, dict) and "group" in item:
            yield from _members(item, overrides, asked)
        else:
            raise _refused(str(member), "it is defined inside its group", asked)


def _config(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task's file; what belongs to groups and tags alone is left out."""
    try:
        values = package.load_yaml(path)
    except KvcliError:
        raise
    except Exception as e:  # a task's file imports whatever it likes
        what = f"{path} cannot be read: {type(e).__name__}: {e}"
        raise KvcliError(what, given=str(path), fix="install what it needs") from e
    values = {**values, **overrides}
    return {k: v for k, v in values.items() if k not in ("tag", "task_list", "group_alias")}


def _task(source: str, config: dict[str, Any]) -> HarnessTask:
    kind = _kind(config)
    generation = config.get("generation_kwargs") or {}
    until = generation.get("until", config.get("fewshot_delimiter", "\n\n"))
    metadata = config.get("metadata")
    stops = tuple(text for text in ([until] if isinstance(until, str) else until or ()) if text)
    return HarnessTask(
        name=PREFIX + source,
        version=str(metadata.get("version", 0) if isinstance(metadata, dict) else 0),
        ability="lm-evaluation-harness",
        metric=_metric(config["task"], config),
        shots=int(config.get("num_fewshot") or 0),
        max_new_tokens=generation_length(generation) or MAX_GEN_TOKS,
        until=stops if kind == "generate_until" else (),
        output_type=kind,
        chat=False,
        source=PREFIX + source,
        digest=_digest(config),
        config=config,
    )


def generation_length(arguments: Mapping[str, Any]) -> int | None:
    """The new tokens that `generation_kwargs` allow; None where they do not say."""
    lengths = [arguments[key] for key in _LENGTHS if arguments.get(key) is not None]
    return int(lengths[0]) if lengths else None


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("output_type", "generate_until"))


def _check(name: str, config: Mapping[str, Any], asked: str | None = None) -> None:
    """Raises KvcliError for what cannot be asked through a compressed cache, or not safely."""
    reasons = {
        "loglikelihood_rolling": "it measures the perplexity of whole texts: there is no prompt to compress",
        "loglikelihood": "its score asks whether a text is the greedy answer, which log-likelihoods do not say",
    }
    kind = _kind(config)
    if kind in reasons:
        raise _refused(name, reasons[kind], asked)
    if kind not in _DEFAULT_METRICS:
        raise _refused(name, f"its output_type '{kind}' is not known", asked)
    if config.get("unsafe_code"):
        raise _refused(name, "it runs generated programs without a sandbox", asked, fix="--task humaneval")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise _refused(name, "its questions are pictures or sound", asked)
    if config.get("repeats", 1) != 1:
        fix = "another task with --temperature 0.7 --draws 8"
        raise _refused(name, f"it judges {config['repeats']} answers together", asked, fix)
    if (config.get("generation_kwargs") or {}).get("num_beams", 1) != 1:
        raise _refused(name, "it wants a beam search", asked)


def _metric(name: str, config: Mapping[str, Any]) -> str:
    """The first metric that has a value for each sample, higher being better."""
    kind = _kind(config)
    listed = config.get("metric_list") or [{"metric": metric} for metric in _DEFAULT_METRICS[kind]]
    names = []
    for entry in listed:
        metric = entry["metric"]
        text = metric.__name__ if callable(metric) else str(metric)
        names.append(text)
        whole = text in _OVER_A_SET and not callable(config.get("process_results"))
        unasked = kind == "multiple_choice" and text in UNASKED
        if entry.get("higher_is_better", True) is not False and not whole and not unasked:
            return text
    raise _refused(name, f"none of its metrics is the score of a single sample ({', '.join(names)})")


def _digest(config: Mapping[str, Any]) -> str:
    """Hash of all settings and of the files of the functions they name; lm-eval's version is part of it."""
    return stable_hash([package.version(), _plain(config)])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k != "config_source"}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value):
        try:
            code = Path(inspect.getsourcefile(value) or "").read_bytes()
        except (TypeError, OSError):
            code = b""
        return [getattr(value, "__qualname__", type(value).__name__), hashlib.sha256(code).hexdigest()]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _refused(name: str, why: str, asked: str | None = None, fix: str = "") -> KvcliError:
    fix = fix or "a task of lm-eval's kinds generate_until or multiple_choice"
    what = f"lm-eval's task '{name}' cannot be run: {why}"
    return KvcliError(what, given=f"--task {PREFIX}{asked or name}", fix=fix)
