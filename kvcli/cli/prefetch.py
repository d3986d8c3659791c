"""kvcli prefetch: fills the caches of models and data sets, for machines that cannot reach the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvcli.cli import output, prefetch_offline
from kvcli.errors import Exit, KvcliError

if TYPE_CHECKING:
    from kvcli.evals.spec import Task
    from kvcli.hub import Repository

Row = dict[str, Any]
Found = tuple["Repository", list[str], str]
"""A repository, the files to have of it, and what was typed for it."""

WEIGHTS = (".safetensors", ".safetensors.index.json")
OLD_WEIGHTS = (".bin", ".bin.index.json")
"""Taken only where a repository has no safetensors, as transformers does."""
OTHERS = ("consolidated", "training_args", "optimizer", "scheduler", "rng_state", "flax_model", "tf_model")
"""What files begin with that hold weights in other forms, or the state of a training."""
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
NOT_KNOWN = "not known"
"""The state of what only the hub could tell."""


class Wish(NamedTuple):
    """What is asked for on the hub, and what was typed for it. kind: model or tokenizer."""

    kind: str
    name: str
    revision: str | None
    given: str

    @property
    def full_name(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Aliases or ORG/NAME\\[@REV]; a list.", metavar="MODELS", show_default=False
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Tasks, suites, globs or ./file.yaml.", metavar="TASKS", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Hub id of another tokenizer.", metavar="ID", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Model and tasks of a preset.", metavar="NAME", show_default=False),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Fetch model code (.py) too.", show_default=False)
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be fetched; fetch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Bring models and data sets into the local caches, for machines without a network.

    Weights, tokenizers and the rows of tasks are asked for by the names that run and sweep take. A model that wants its
    licence accepted is named with its page before anything is fetched. What is there already is not fetched again. With
    --dry-run, where the hub cannot be reached, the cache is shown and one line says what is not known.

    \b
    Examples:
      kvcli prefetch --model llama3-8b --task kvfundabench
      kvcli prefetch --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k,mmlu --dry-run
      kvcli prefetch --preset kvfundabench_table7
    """
    models, tasks = _asked(model, task, preset)
    if not (models or tasks or tokenizer):
        given = "kvcli prefetch"
        raise KvcliError("there is nothing to fetch", given=given, fix="kvcli prefetch --model llama3-8b --task gsm8k")
    from kvcli.evals.loader import find_tasks

    chosen = find_tasks(tasks) if tasks else []
    rows, wishes = _wishes(models, tokenizer)
    found, unseen, why = _look_up(wishes, trust_remote_code, dry_run)
    _check_room(found)
    rows += unseen
    for repository, files, given in found:
        rows.append(_model_row(repository, files, given, dry_run))
    failures: list[KvcliError] = []
    for one in chosen:
        rows.append(_task_row(one, dry_run, failures))
    output.json_result(rows) if as_json else _print(rows, dry_run)
    if unseen:
        output.warn(prefetch_offline.unknown([row["name"] for row in unseen], why))
    if failures:
        raise failures[0]
    if dry_run:
        output.next_command("the same command without --dry-run" + ", where the hub can be reached" * bool(unseen))
        return
    output.note("on a machine without a network, with the same HF_HOME: HF_HUB_OFFLINE=1")
    output.next_command(_sweep(models, chosen))


def _asked(model: list[str] | None, task: list[str] | None, preset: str | None) -> tuple[list[str], list[str]]:
    """Models and tasks as typed; those of the preset where none were."""
    models = [piece.strip() for text in model or () for piece in text.split(",") if piece.strip()]
    tasks = list(task or ())
    if preset is not None:
        from kvcli.cli import presets

        settings, _ = presets.read(preset)
        models = models or [str(settings.get("model", "testbed"))]
        tasks = tasks or [str(text) for text in settings.get("tasks", ())]
    return models, tasks


def _wishes(models: list[str], tokenizer: str | None) -> tuple[list[Row], list[Wish]]:
    """Rows for what needs no hub, and what is to be asked for there. Raises KvcliError for texts of no model."""
    from kvcli.models.source import parse_model

    rows: list[Row] = []
    wishes: list[Wish] = []
    for source in [parse_model(text) for text in models]:
        if source.kind == "hub":
            wishes.append(Wish("model", source.place, source.revision, f"--model {source.text}"))
        else:
            rows.append(_row("model", source.text, 0, 0, "needs no hub", source.place))
    if tokenizer is not None:
        if tokenizer.startswith((".", "/", "~")) or Path(tokenizer).is_dir():
            rows.append(_row("tokenizer", tokenizer, 0, 0, "needs no hub", str(Path(tokenizer).expanduser())))
        else:
            wishes.append(Wish("tokenizer", tokenizer, None, f"--tokenizer {tokenizer}"))
    return rows, wishes


def _look_up(wishes: list[Wish], code: bool, dry_run: bool) -> tuple[list[Found], list[Row], str]:
    """Repositories with the files to have. In a dry run a hub that cannot be reached is asked once: rows say what the
    cache holds of the others, and the text why. Raises KvcliError for any that cannot be had."""
    from kvcli import hub

    found: list[Found] = []
    rows: list[Row] = []
    why = ""
    for wish in wishes:
        repository = None
        if not why:
            try:
                repository = hub.look_up(wish.name, wish.revision, wish.given)
            except KvcliError as e:
                if not dry_run or not e.what.startswith(prefetch_offline.AWAY):
                    raise
                why = prefetch_offline.reason(e.what)
        if repository is None:
            rows.append(_cached_row(wish, code))
        else:
            found.append((repository, wanted(repository.files, weights=wish.kind == "model", code=code), wish.given))
    return found, rows, why


def _cached_row(wish: Wish, code: bool) -> Row:
    """A repository of which only the local cache is known."""
    from kvcli import hub

    commit, sizes = prefetch_offline.cached(wish.name, wish.revision)
    files = wanted(sizes, weights=wish.kind == "model", code=code)
    place = str(hub.cache_folder()) if files else None
    size = sum(sizes[name] for name in files)
    return _row(wish.kind, wish.full_name, size, None, NOT_KNOWN, place, commit=commit, files=files)


def wanted(files: Any, *, weights: bool, code: bool) -> list[str]:
    """Those files of a repository that transformers reads: at its top, weights in safetensors where there are any."""
    top = [name for name in sorted(files) if "/" not in name and not name.startswith(OTHERS)]
    kinds = WEIGHTS if any(name.endswith(WEIGHTS[0]) for name in top) else OLD_WEIGHTS
    taken = [name for name in top if name.endswith(TEXTS) and not name.endswith(".index.json")]
    taken += [name for name in top if weights and name.endswith(kinds)]
    taken += [name for name in top if code and name.endswith(".py")]
    return sorted(taken)


def _check_room(found: list[Found]) -> None:
    """Raises KvcliError where the disk of the cache is too small."""
    from kvcli import hub

    needed = sum(_bytes(repository, hub.missing(repository, files)) for repository, files, _ in found)
    if not needed:
        return
    place = hub.cache_folder()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        what = f"{output.size(needed)} are to be fetched, the disk of {place} has {output.size(free)}"
        fix = "HF_HOME=FOLDER on a larger disk"
        raise KvcliError(what, given=found[0][2], fix=fix, code=Exit.ENVIRONMENT)


def _bytes(repository: Repository, files: list[str]) -> int:
    return sum(repository.files[name] for name in files)


def _model_row(repository: Repository, files: list[str], given: str, dry_run: bool) -> Row:
    from kvcli import hub

    kind = given.split()[0].removeprefix("--")
    absent = hub.missing(repository, files)
    whole, fetched = _bytes(repository, files), _bytes(repository, absent)
    place = str(hub.cache_folder())
    if not dry_run:
        if absent:
            output.note(f"fetching {repository.name}: {len(absent)} files, {output.size(fetched)}")
        place = str(hub.fetch(repository, files, given))
    state = ("to fetch" if dry_run else "fetched") if absent else "was there"
    name = repository.name + (f"@{repository.revision}" if repository.revision else "")
    return _row(kind, name, whole, fetched, state, place, commit=repository.commit, files=files)


def _task_row(task: Task, dry_run: bool, failures: list[KvcliError]) -> Row:
    """Asks a task for one sample, so that exactly the splits are loaded that it reads; with dry_run from the cache.

    Raises KvcliError where the hub is away; other faults go to `failures`.
    """
    from contextlib import nullcontext

    from kvcli import hub
    from kvcli.evals.data import watched

    path, name = (getattr(task, key, None) for key in ("dataset_path", "dataset_name"))
    named = " ".join(filter(None, (path, name))) if path else None
    if not dry_run:
        output.note(f"loading the rows of {task.name}")
    with watched() as seen, hub.offline() if dry_run else nullcontext():
        try:
            task.samples(shots=task.usual_shots, shot_seed=0, limit=1, data_dir=None)
        except KvcliError as e:
            away = prefetch_offline.AWAY in e.what
            if away and not dry_run:
                raise
            if not away:
                failures.append(e)
            return _row("task", task.name, 0, 0, "to load" if away else f"failed: {e.what}", None, data_set=named)
    splits = {item.split: item.rows for item in seen}
    size = sum({(item.folder, item.split): item.size for item in seen}.values())
    place = next((item.folder for item in seen if item.folder), None)
    state = "loaded" if seen else "ready"
    return _row("task", task.name, size, None, state, place, data_set=named, splits=splits)


def _row(kind: str, name: str, size: int, fetched: int | None, state: str, place: str | None, **more: Any) -> Row:
    return {"kind": kind, "name": name, "bytes": size, "fetched_bytes": fetched, "state": state, "place": place, **more}


def _print(rows: list[Row], dry_run: bool) -> None:
    listed = [
        (row["kind"], row["name"], output.size(row["bytes"]) if row["bytes"] else None, row["state"], _detail(row))
        for row in rows
    ]
    table = output.table(("what", "name", "size", "state", "of it"), listed)
    for column in table.columns[:3]:
        column.no_wrap = True  # states and details wrap between words
    output.result(table)
    for place in dict.fromkeys(row["place"] for row in rows if row["place"]):
        output.result(f"in {place}")
    total = sum(row["fetched_bytes"] or 0 for row in rows)
    if total:
        output.result(f"models: {output.size(total)} {'to fetch' if dry_run else 'fetched'}")


def _detail(row: Row) -> str | None:
    if row.get("files") is not None:
        count = f"{len(row['files'])} files" + " in the cache" * (row["state"] == NOT_KNOWN)
        return f"commit {row['commit'][:12]}, {count}" if row["commit"] else count
    if row.get("splits"):
        return ", ".join(f"{split} {rows:,} rows" for split, rows in row["splits"].items())
    return row.get("data_set")


def _sweep(models: list[str], tasks: list[Task]) -> str:
    from kvcli.evals.loader import text_of

    text = f"HF_HUB_OFFLINE=1 kvcli sweep --model {models[0] if models else 'MODEL'}"
    return text + (f" --task {','.join(map(text_of, tasks[:3]))}" if tasks else "")
