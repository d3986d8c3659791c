"""One command's work in one result folder: open or resume it, let the grid grow, run what is missing, close it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.config import GRID, HOUSEKEEPING, SweepConfig
from kvcli.engine.cells import Cell, make_cells
from kvcli.engine.checking import Request
from kvcli.engine.estimate import Estimate, Sizes, estimate, rows_that_fit
from kvcli.engine.plan import MAX_DECODE_ROWS, Generation, Plan
from kvcli.engine.prepare import Prepared, cell_facts, prepare
from kvcli.errors import KvcliError
from kvcli.evals.loader import text_of
from kvcli.methods import catalog
from kvcli.results.schema import SCHEMA, prompts_name
from kvcli.weights.spec import DENSE

if TYPE_CHECKING:
    from kvcli.results.store import RunStore

SMALL = 20_000_000
"""Models below this many parameters run on one thread: their products are too small to share, and threads that wait
for each other beside another process cost many times what they save."""

DEFAULT_MEMORY = {"cpu": 512 << 20, "cuda": 8 << 30}
"""Bytes for the caches of one decode batch unless --memory says otherwise; fixed, because batches must not depend on
what happens to be free."""


@dataclass
class Session:
    """A checked request with its prompts, its plan and the state of its folder."""

    prepared: Prepared
    plan: Plan
    wanted: list[Cell]
    run: dict[str, Any]
    decode_rows: int
    cache_bytes: int
    """Bytes that the caches of one decode batch may take."""
    figures: bool
    """Whether what methods keep beside the pairs counts among them."""
    folder: Path
    done: set[tuple[str, str]]
    """(cell, sample) pairs that already have a record."""

    def estimate(self) -> Estimate:
        length = self.prepared.request.config.max_new_tokens
        config = self.prepared.model_config
        return estimate(
            self.plan, {c.id for c in self.wanted}, self.prepared.prompt_sets, Sizes.of(config),
            _itemsize(self.prepared), self.decode_rows, length, self.done, self.prepared.request.config.limit,
            {c.method: catalog.build(c.method) for c in self.plan.cells.values()}, self.cache_bytes,
            self.prepared.request.config.fidelity,
        )  # fmt: skip


def open_session(request: Request, say: Callable[[str], None], *, writing: bool = True) -> Session:
    """Reads the folder's state (writing nothing), prepares prompts and plan. writing: `execute` is to follow.

    Raises KvcliError when the folder holds results of another model, tokenizer, dtype, data or settings, or when
    another process writes to it: said before the plan is made, which can take long.
    """
    from kvcli.results.store import RUN, SAMPLES, check_out, ensure_same, lock_records, read_run

    folder = Path(request.out)
    check_out(folder)
    if writing and (folder / SAMPLES).exists():
        with suppress(OSError):  # a file system's refusal is told when the folder is opened
            lock_records(folder / SAMPLES).release()
    old = read_run(folder) if (folder / RUN).exists() else {}
    generations = list(old.get("generations", []))
    limits = [g["grid"]["limit"] for g in generations] + [request.config.limit]
    prepared = prepare(request, None if None in limits else max(limits), say)
    identity = full_identity(prepared)
    if "identity" in old:
        grown = {k: v for k, v in old["identity"].items() if k not in OUTGROWN}
        ensure_same(grown, identity, folder)
    wanted = prepared.cells
    grid = {name: value for name, value in request.config.to_dict().items() if name in GRID}
    if not any(_covers(g, wanted, request.config.limit) for g in generations):
        generations.append({"grid": grid, "cells": [c.id for c in wanted]})
    prepared.cells = _all_cells(prepared, generations)
    done = _same_samples(prepared, folder)
    batching = old.get("batching", {})
    own = request.config.prefill_batch
    if own == SweepConfig.prefill_batch:
        again = None if request.config.memory else batching.get("prefill_rows")
        own = again or min(own, _rows(prepared, own))
    plan = prepared.plan([Generation(tuple(g["cells"]), g["grid"]["limit"]) for g in generations], own)
    rows, room = request.config.decode_batch, None
    if not rows:
        again = {} if request.config.memory else batching
        rows, room = again.get("decode_rows") or _rows(prepared, MAX_DECODE_ROWS), again.get("cache_bytes")
    if room is None:
        room = rows * Sizes.of(prepared.model_config).kv_elements * _itemsize(prepared) * _longest(prepared)
    figures = bool(request.config.memory or batching.get("figures", not batching))
    run = {**old, "identity": identity, "generations": generations,
           "batching": {**batching, "decode_rows": rows, "cache_bytes": room, "figures": figures,
                        "prefill_rows": own}}  # fmt: skip
    return Session(prepared, plan, wanted, run, rows, room, figures, folder, done)


OUTGROWN = ("shot_seed",)
"""What folders of earlier versions count to their identity and is an axis of the grid by now."""


def full_identity(prepared: Prepared) -> dict[str, Any]:
    """What a folder's results have in common: model, dtype, tokenizer, and all settings that are not the grid."""
    config = prepared.request.config.to_dict()
    own = {
        k: v
        for k, v in config.items()
        if k not in (*GRID, *HOUSEKEEPING, "model", "dtype", "device", "data_dir", "attn")
    }
    return {**own, **prepared.identity}


def _covers(generation: dict[str, Any], wanted: list[Cell], limit: int | None) -> bool:
    had = generation["grid"]["limit"]
    enough = had is None or (limit is not None and limit <= had)
    return enough and {c.id for c in wanted} <= set(generation["cells"])


def _all_cells(prepared: Prepared, generations: list[dict[str, Any]]) -> list[Cell]:
    """The wanted cells and those earlier commands asked for on the same prompts, so that batches form as they did."""
    request = prepared.request
    cells = {cell.id: cell for cell in prepared.cells}
    facts = cell_facts(prepared.identity, request.config)
    before = {name: value for name, value in SweepConfig().to_dict().items() if name in GRID}
    keys = set(prepared.prompt_sets)
    for generation in generations:
        values = {**request.config.to_dict(), **before, **generation["grid"]}  # an older grid lacks newer axes
        config = SweepConfig.from_dict(values, given="run.json")
        tasks = [t for t in request.tasks if text_of(t) in config.tasks]
        try:
            earlier = make_cells(config, tasks, facts)
        except KvcliError:  # a plugin file that is gone: its cells cannot be formed again
            continue
        cells.update((c.id, c) for c in earlier if c.prompt_key in keys and c.id in generation["cells"])
    return list(cells.values())


def _same_samples(prepared: Prepared, folder: Path) -> set[tuple[str, str]]:
    """Every sample with a record of the cells at hand must still be there with the same prompt.

    Returns the (cell, sample) pairs that are done.
    """
    from kvcli.results.store import read_records

    now = {
        (*key[:4], sample.id): prompt.sha
        for key, prompts in prepared.prompt_sets.items()
        for sample, prompt in zip(prompts.samples, prompts.prompts, strict=True)
    }
    cells = {cell.id for cell in prepared.cells}
    done = set()
    for record in read_records(folder, ("task", "shots", "shot_seed", "shot_order", "prompt_sha", "status")):
        if record["status"] == "ok":
            done.add((record["cell_id"], record["sample_id"]))
        task, sample, seen = record["task"], record["sample_id"], record["prompt_sha"]
        key = (task, record["shots"], record.get("shot_seed") or 0, record.get("shot_order") or 0, sample)
        if seen and record["cell_id"] in cells and now.get(key) != seen:
            what = f"{folder} holds results of other data for {task}"
            given = f"sample {sample} is {'another' if key in now else 'no longer among the first'}"
            if key not in now and any(s.too_long for k, s in prepared.prompt_sets.items() if k.task == task):
                most = prepared.request.config.max_prompt_tokens
                what = f"{folder} holds results of prompts that --max-prompt-tokens {most} leaves out"
            raise KvcliError(what, given=given, fix="--out with another folder, or the data it was made with")
    return done


def _rows(prepared: Prepared, most: int) -> int:
    """Rows of the longest prompt and its answer that fit the memory for caches."""
    kind = prepared.device.partition(":")[0]
    memory = prepared.request.config.memory
    room = parse_memory(memory) if memory else DEFAULT_MEMORY.get(kind, 1 << 30)
    return rows_that_fit(prepared.model_config, _itemsize(prepared), _longest(prepared), room, most)


def _longest(prepared: Prepared) -> int:
    """Tokens of the longest prompt with its answer."""
    longest = 1
    for prompts in prepared.prompt_sets.values():
        room = prompts.new_tokens(prepared.request.config.max_new_tokens)
        longest = max([longest, *(len(p.ids) + room for p in prompts.prompts)])
    return longest


def _itemsize(prepared: Prepared) -> int:
    import torch

    return int(getattr(torch, prepared.dtype).itemsize)


def parse_memory(text: str) -> int:
    """'512M', '8G', '1.5GiB' -> bytes. Raises KvcliError."""
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise KvcliError(f"'{text}' is not an amount of memory", given=f"--memory {text}", fix="--memory 8G")
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2].upper()) + 1))


def task_facts(prepared: Prepared, old: dict[str, Any]) -> dict[str, Any]:
    """What the analysis must know of each task, and the first prompt's hash per number of shots."""
    tasks = dict(old)
    for key, prompts in prepared.prompt_sets.items():
        task, name = prompts.task, key.task
        which = prompts_name(*key[1:4])
        data = {**tasks.get(name, {}).get("data", {}), which: prompts.prompts[0].sha if prompts.prompts else ""}
        judge = {k: v for k, v in tasks.get(name, {}).items() if k == "judge"}
        before = tasks.get(name, {})
        too_long = {**(before.get("too_long") or {}), which: prompts.too_long}
        left_out = {**(before.get("left_out") or {}), which: prompts.left_out}
        tasks[name] = {
            **judge, "ability": task.ability, "metric": task.metric, "version": task.version, "chance": task.chance,
            "harmful": task.harmful, "reference": task.published, "suites": list(task.suites),
            "conditions": list(task.conditions),
            "source": task.source, "samples": len(prompts.samples), "too_long": too_long, "left_out": left_out,
            "data": data,
        }  # fmt: skip
    return tasks


def execute(
    session: Session,
    *,
    argv: list[str],
    passed: dict[str, Any],
    say: Callable[[str], None],
    warn: Callable[[str], None],
    progress: Callable[[int, int, str], None],
    stop: Callable[[bool], Any],
) -> Any:
    """Runs what is missing of the wanted cells and returns the runner's Outcome."""
    import torch

    from kvcli.engine.reweighting import Models
    from kvcli.engine.runner import Options, Outcome, Runner
    from kvcli.results import provenance
    from kvcli.results.store import now, read_records

    prepared, config = session.prepared, session.prepared.request.config
    if config.threads:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ and Sizes.of(prepared.model_config).parameters < SMALL:
        torch.set_num_threads(1)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    with _opened(session.folder) as store:
        for note in store.notes:
            warn(note)
        wanted = {c.id for c in session.wanted}
        options = Options(
            session.decode_rows, config.keep_maps, config.store_prompts, config.max_new_tokens, config.ignore_eos,
            config.strict_window, config.deterministic, config.fidelity, session.cache_bytes, config.temperature,
            config.top_p, session.figures,
        )  # fmt: skip
        runner = Runner(
            None, session.plan, prepared.prompt_sets, store, options, stop, progress,  # type: ignore[arg-type]
            wanted=wanted, limit=config.limit,
        )  # fmt: skip
        if runner.anything_missing():
            runner.full_outputs = _full_outputs(read_records(session.folder), session.plan)
            runner.enter = Models(
                prepared, say, partial(_pruned, store), runner.stopping,
                watch=lambda text: progress(runner.seen, runner.total, text),
            ).enter  # fmt: skip
            runner.model = runner.enter(DENSE)  # what cannot be loaded or run is refused before anything is written
        with store.edit_run() as run:
            run.update(session.run)
            run.update(
                schema=SCHEMA, status="running", argv=argv, passed=passed, config=config.to_dict(),
                tasks=task_facts(prepared, run.get("tasks", {})), provenance=provenance.collect(),
                commands=[*run.get("commands", []), {"argv": argv, "at": now(), **provenance.collect()}],
                cells={**run.get("cells", {}), **{c.id: c.describe() for c in prepared.cells}},
            )  # fmt: skip
        outcome: Outcome = Outcome()
        status = "failed"
        try:
            if runner.model is not None:
                with store.edit_run() as run:
                    run["model"] = dataclasses.asdict(runner.model.shapes)
                outcome = runner.run()
            status = "stopped" if outcome.stopped else "done"
        finally:
            outcome = runner.outcome  # of a run that failed too
            for what in outcome.halved:
                warn(what)
            with store.edit_run() as run:
                run["status"] = status
                if outcome.halved:
                    run["batching"]["out_of_memory"] = [*run["batching"].get("out_of_memory", ()), *outcome.halved]
    return outcome


def _pruned(store: RunStore, weights: str, facts: dict[str, Any]) -> None:
    with store.edit_run() as run:
        run["weights"] = {**run.get("weights", {}), weights: facts}


@contextmanager
def _opened(folder: Path) -> Iterator[RunStore]:
    """The folder opened for writing; one that held nothing is gone again when the model turns out to be unusable."""
    from kvcli.results.store import RUN, RunStore

    fresh = not folder.exists()
    try:
        with RunStore(folder) as store:
            yield store
    except KvcliError:
        if fresh and folder.exists() and not (folder / RUN).exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        raise


def _full_outputs(records: list[dict[str, Any]], plan: Plan) -> dict[tuple[str, str], list[int]]:
    from kvcli.engine.comparing import mode_of

    found = {}
    for record in records:
        if record["method"] == "full" and record["status"] == "ok" and record["cell_id"] in plan.cells:
            found[mode_of(plan.cells[record["cell_id"]]), record["sample_id"]] = record["output_ids"]
    return found
