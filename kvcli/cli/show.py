"""kvcli show: one prompt with the tokens each method kept, and all outputs side by side."""

from __future__ import annotations

import os
import shlex
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.analysis.reading import names
from kvcli.cli import output
from kvcli.cli.following import next_in
from kvcli.cli.show_lists import show_samples, show_tasks
from kvcli.cli.show_pick import Pick, Record, records_of
from kvcli.errors import KvcliError, unknown
from kvcli.grammar import ratio_text
from kvcli.results import store

if TYPE_CHECKING:
    from rich.text import Text

MOST_MAPS = 4
SHADES = ((0.75, "black on #3fb950"), (0.5, "on #238746"), (0.25, "on #1b5e32"), (0.0, "on #12351f"))
"""Style of a token by the share of layers and KV heads that kept it; dim where none did."""

HEADERS = ("method", "size", "measured", "score", "answer", "flags", "output")
DISPENSABLE = ("flags", "measured", "answer")
"""Left away in this order where the screen is too narrow for names in one line and outputs of OUTPUT_WIDTH."""
OUTPUT_WIDTH = 20


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A result folder, its name or a unique beginning of it.")],
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="The task; without it: what there is.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="ID", help="The sample's id; without it: all, changed ones first.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", metavar="METHODS", help="Only these methods, and full.")
    ] = None,
    ratio: Annotated[
        list[str] | None, typer.Option("--ratio", metavar="RATIOS", help="Only these kept ratios, and full.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights", metavar="WEIGHTS", help="Only these weights: dense, sparsegpt (all of them), sparsegpt:2:4."
        ),
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="Print outputs whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print one prompt with kept tokens marked and all outputs.

    Without --sample it lists a task's samples, those first whose score most cells change.

    Examples:
      kvcli show runs/demo
      kvcli show runs/demo --task tb_recall
      kvcli show runs/demo --task tb_recall --sample ID --method snapkv --ratio 0.1
    """
    pick = Pick.of(method or [], ratio or [], weights or [])
    folder = store.find_run(run)
    if task is None and sample is not None:
        raise _without_task(folder, sample)
    if task is None:
        show_tasks(folder, pick, as_json)
    elif sample is None:
        show_samples(folder, task.replace("-", "_"), pick, as_json)
    else:
        facts = facts_of_sample(folder, task.replace("-", "_"), sample, pick)
        output.json_result(facts) if as_json else _show_sample(folder, facts, long)


def _without_task(folder: Path, sample: str) -> KvcliError:
    """Ids are a task's own: the tasks of the folder that have this one."""
    having = {r["task"]: None for r in store.read_records(folder, ("task",)) if r["sample_id"] == sample}
    fix = " or ".join(f"--task {task} --sample {sample}" for task in list(having)[:3])
    fix = f"{fix}     (kvcli show {folder} shows all tasks)" if having else f"kvcli show {folder} --task TASK shows ids"
    return KvcliError("--sample needs --task", given=f"--sample {sample}", fix=fix)


def facts_of_sample(folder: Path, task: str, sample: str, pick: Pick) -> dict[str, Any]:
    """The prompt and, per cell, its output, scores and the share of layers and heads that kept each token.

    One sample can have several prompts (other shots or shot seed): then `prompts` holds those facts for each of them.
    """
    every = records_of(folder, task, None)
    records = [record for record in every if record["sample_id"] == sample]
    if not records:
        known = {record["sample_id"] for record in every}
        listing = f"kvcli show {folder} --task {task}"
        raise unknown("sample", sample, known, given=f"--sample {sample}", listing=listing)
    chosen = [record for record in records if pick.shown(record)]
    if not any(pick.named(record) for record in records):
        cells = sorted({_called(record) for record in records})
        given = f"--sample {sample}{pick.options()}"
        raise KvcliError("no such cell in this folder", given=given, fix=f"one of {', '.join(cells)}")
    chosen.sort(key=lambda r: (r["method"] != "full", r["ratio"] or 0, r["budget"] or 0, r["method"], r["first_token"]))
    prompts = store.read_prompts(folder)
    groups = [_group(folder, *group, prompts) for group in _by_prompt(folder, chosen, records)]
    head = {"task": task, "sample_id": sample}
    if len(groups) > 1:
        return {**head, "prompts": groups}
    return {**head, **{name: groups[0][name] for name in ("target", "prompt", "cells")}}


def _by_prompt(
    folder: Path, chosen: list[Record], records: list[Record]
) -> list[tuple[str | None, tuple[int, int], list[Record]]]:
    """(hash, shot seed and order, its records) of every distinct prompt, fewest shots first.

    A failed record names no prompt: it belongs to that of the sample's other records with its shots and shot seed.
    """
    described = store.read_run(folder).get("cells") or {} if (folder / store.RUN).is_file() else {}

    def shots(record: Record) -> tuple[int, int, int]:
        cell = described.get(record["cell_id"]) or {}
        seed, order = (record.get(n) or cell.get(n) or 0 for n in ("shot_seed", "shot_order"))
        return record["shots"] or 0, seed, order

    known = {shots(record): record["prompt_sha"] for record in records if record["prompt_sha"]}
    groups: dict[Any, list[Record]] = {}
    for record in chosen:
        groups.setdefault(record["prompt_sha"] or known.get(shots(record)) or shots(record), []).append(record)
    found = [(sha if isinstance(sha, str) else None, shots(group[0])[1:], group) for sha, group in groups.items()]
    return sorted(found, key=lambda f: shots(f[2][0]))


def _group(
    folder: Path, sha: str | None, which: tuple[int, int], records: list[Record], prompts: dict[str, Any]
) -> dict[str, Any]:
    """One prompt of the sample with its cells."""
    target = next((record["target"] for record in records if record["target"] is not None), None)
    profiles = _profiles(folder)
    return {
        "prompt_sha": sha, "shots": records[0]["shots"], "shot_seed": which[0], "shot_order": which[1],
        "target": target, "prompt": prompts.get(sha) if sha else None,
        "cells": [
            {**_cell(record), "head_profile": profiles.get(record["cell_id"]), "kept_share": _share(folder, record)}
            for record in records
        ],
    }  # fmt: skip


def _called(record: Record) -> str:
    """'snapkv ratio 0.1, sparsegpt:2:4': what tells a cell from most others."""
    return f"{record['method']} {_size(record)}" + (f", {_weights(record)}" if _weights(record) else "")


def _profiles(folder: Path) -> dict[str, str]:
    """Of cells whose method reads how much heads retrieve: which numbers it read."""
    cells = store.read_run(folder).get("cells") or {} if (folder / store.RUN).is_file() else {}
    return {name: cell["head_profile"] for name, cell in cells.items() if cell.get("head_profile")}


def _cell(record: Record) -> dict[str, Any]:
    fields = (
        "cell_id", "method", "ratio", "budget", "measured_ratio", "first_token", "query", "shots", "shot_seed",
        "shot_order", "seed", "draw",
        "decode", "weights", "match", "status", "error",
        "score", "extracted", "output", "finish", "flags", "incoherent", "n_prompt", "kept", "kept_by_region",
    )  # fmt: skip
    return {name: record.get(name) for name in fields}


def _share(folder: Path, record: Record) -> list[float] | None:
    """Per prompt token: mean over layers of the share of KV heads that kept it; None where it was not stored."""
    path = store.map_path(folder, record["task"], record["sample_id"], record["cell_id"])
    if not path.is_file() or not record["n_prompt"]:
        return None
    import numpy as np

    kept = store.read_map(path)
    share = np.zeros(record["n_prompt"])
    for heads in kept:
        share += np.bincount(np.concatenate(heads), minlength=len(share)) / len(heads)
    return [round(float(value), 4) for value in share / len(kept)]


def _show_sample(folder: Path, facts: dict[str, Any], long: bool) -> None:
    groups = facts.get("prompts") or [facts]
    for number, group in enumerate(groups, 1):
        if len(groups) > 1:
            output.result(f"--- prompt {number} of {len(groups)}: {_label(group, groups)} ---")
        _show_prompt(folder, facts, group, long)
    kept = any(cell["kept_share"] and cell["method"] != "full" for group in groups for cell in group["cells"])
    if kept and not output.colours():
        output.note("· = fewer than half of the layers and KV heads kept the token (a terminal shows the share)")
    next_in(folder, f"kvcli show {folder} --task {facts['task']}     (its other samples)")


def _label(group: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """Its shots, and what else tells it from the sample's other prompts."""
    shots = "shots not recorded" if group["shots"] is None else output.count(group["shots"], "shot")
    parts = [shots]
    if len({g["shot_seed"] for g in groups}) > 1:
        parts.append(f"shot seed {group['shot_seed']}")
    if len({g["shot_order"] for g in groups}) > 1:
        parts.append(f"shot order {group['shot_order']}")
    if sum(all(g[n] == group[n] for n in ("shots", "shot_seed", "shot_order")) for g in groups) > 1:
        parts.append(f"prompt {(group['prompt_sha'] or 'not recorded')[:12]}")
    return ", ".join(parts)


def _show_prompt(folder: Path, sample: dict[str, Any], facts: dict[str, Any], long: bool) -> None:
    maps = [cell for cell in facts["cells"] if cell["kept_share"] and cell["method"] != "full"]
    prompt = facts["prompt"]
    if prompt is None or prompt.get("text") is None:
        output.note("the prompt's text is not stored (prompts of harmful tasks: sweep --store-prompts)")
    elif not maps:
        output.result(_marked(prompt, None))
        output.note("kept tokens are stored for the first samples of each task only (sweep --keep-maps N)")
        drawn = _drawing(folder, sample, facts["cells"])
        if drawn:
            output.note(f"drawn without a new sweep: {drawn}")
    for cell in maps[:MOST_MAPS] if prompt and prompt.get("text") is not None else []:
        mean = sum(cell["kept_share"])
        output.result(f"{_name(cell)}: {mean:.1f} of {cell['n_prompt']} tokens kept (mean over layers and KV heads)")
        output.result(_marked(prompt, cell["kept_share"]))
    output.result(f"target: {facts['target']}")
    _show_outputs(facts["cells"], long)
    if len(maps) > MOST_MAPS:
        output.note(f"{MOST_MAPS} of {len(maps)} kept sets shown: --method and --ratio choose others")


_AS_SWEPT = ("tokenizer", "template", "system", "data_dir", "max_prompt_tokens", "truncate")
"""Settings of a sweep that prompts depend on and attn-map takes too."""


def _drawing(folder: Path, sample: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """The command that draws what one of the cells keeps of this prompt, one that scores lower than full if there is
    one; empty where there is none."""
    full = max((c["score"] or 0.0 for c in cells if c["method"] == "full"), default=0.0)
    asked = [c for c in cells if c["method"] != "full" and (c["ratio"] is not None or c["budget"] is not None)]
    asked = [c for c in asked if not _weights(c)]  # attn-map reads dense weights
    if not asked:
        return ""
    cell = min(asked, key=lambda c: (c["score"] is None, (c["score"] or 0.0) >= full))
    size = ("--ratio", f"{cell['ratio']:g}") if cell["ratio"] is not None else ("--budget", str(cell["budget"]))
    config = (store.read_run(folder).get("config") or {}) if (folder / store.RUN).is_file() else {}
    words = ["--model", str(config["model"])] if config.get("model") not in (None, "testbed") else []
    words += ["--task", sample["task"], "--sample", sample["sample_id"], "--method", cell["method"], *size]
    words += ["--shots", str(cell["shots"])] if config.get("shots") and cell["shots"] is not None else []
    for name in ("shot_seed", "shot_order"):
        words += [f"--{name.replace('_', '-')}", str(cell[name])] if cell.get(name) else []
    for name in _AS_SWEPT:
        if config.get(name) not in (None, "auto"):
            words += [f"--{name.replace('_', '-')}", str(config[name])]
    return shlex.join(["kvcli", "attn-map", *words])


def _show_outputs(cells: list[dict[str, Any]], long: bool) -> None:
    """A line for each cell; weights that all of them share stand above."""
    weights = {_weights(cell) for cell in cells}
    if len(weights) == 1 and "" not in weights:
        output.result(f"weights: {min(weights)}")
    rows = [_row(cell, long, len(weights) > 1) for cell in cells]
    headers = _fitting(rows)
    table = output.table(headers, [[row[HEADERS.index(name)] for name in headers] for row in rows])
    for column in table.columns[1:-1]:
        column.no_wrap = True
    output.result(table)
    gone = [name for name in HEADERS if name not in headers]
    if gone:
        output.note(f"not shown on a screen this narrow: {', '.join(gone)} (--json has them)")


def _fitting(rows: list[tuple[Any, ...]]) -> list[str]:
    """The columns that there is room for."""
    room = output.console()
    bound = room.width if room.is_terminal or "COLUMNS" in os.environ else None
    wide = {name: max(len(name), *(len(str(row[i])) for row in rows)) for i, name in enumerate(HEADERS)}
    wide["output"] = min(wide["output"], OUTPUT_WIDTH)
    headers = list(HEADERS)
    for name in DISPENSABLE:
        if bound is not None and sum(wide[kept] + 3 for kept in headers) - 1 > bound:
            headers.remove(name)
    return headers


def _name(cell: dict[str, Any]) -> str:
    mode = "" if cell["first_token"] in ("compressed", "n/a", None) else f", first token from {cell['first_token']}"
    apart = f", {_told_apart(cell)}" if _told_apart(cell) else ""
    decode = names.decoding(cell.get("decode"))
    weights = f", {_weights(cell)}" if _weights(cell) else ""
    return f"{cell['method']} {_size(cell)}{weights}{', ' * bool(decode)}{decode}{mode}{apart}"


def _told_apart(cell: dict[str, Any]) -> str:
    """'agnostic, seed 1, draw 2': what tells cells of one method and size from each other."""
    query = cell.get("query") or "aware"
    parts = [query] * (query != "aware") + [f"seed {cell['seed']}"] * bool(cell["seed"])
    parts += [f"draw {cell['draw']}"] * bool(cell.get("draw"))
    return ", ".join([*parts, *[f"head profile {cell['head_profile']}"] * bool(cell.get("head_profile"))])


def _weights(cell: dict[str, Any]) -> str:
    """Those of a pruned model; dense ones need no word."""
    weights = cell.get("weights")
    return "" if weights in (None, "dense") else str(weights)


def _size(cell: dict[str, Any]) -> str:
    if cell["ratio"] is not None:
        return f"ratio {ratio_text(Decimal(str(cell['ratio'])))}"
    if cell.get("match"):
        return f"= {cell['match']}"
    return f"budget {cell['budget']}" if cell["budget"] is not None else "-"


def _row(cell: dict[str, Any], long: bool, weighed: bool) -> tuple[Any, ...]:
    text = cell["output"] if cell["status"] == "ok" else f"failed: {cell['error']}"
    text = text or ""
    if not long:
        text = " ".join(text.split())
        text = text if len(text) <= 100 else text[:97] + "..."
    measured, score = _short(cell["measured_ratio"]), _short(cell["score"])
    extras = [names.decoding(cell.get("decode")), _weights(cell) if weighed else "", _told_apart(cell)]
    method = " ".join(filter(None, [cell["method"], *(f"[{x}]" for x in extras if x)]))
    flags = [*(cell["flags"] or []), *["incoherent"] * bool(cell["incoherent"])]
    return method, _size(cell), measured, score, cell["extracted"], " ".join(flags) or "-", text


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _marked(prompt: dict[str, Any], share: list[float] | None) -> Text:
    """The prompt by regions, each token in the style (off a terminal: dots) of its share."""
    from rich.text import Text

    coloured, ends, text = output.colours(), prompt["offsets"], prompt["text"]
    drawn = Text()
    for label, start, end in prompt["regions"]:
        if (ends[start - 1] if start else 0) == ends[end - 1]:
            continue  # special tokens without text
        kept = "" if share is None else f": {100 * sum(share[start:end]) / (end - start):.0f} % kept"
        drawn.append(f"[{label}{kept}]\n", "bold" if coloured else "")
        for token in range(start, end):
            piece = text[ends[token - 1] if token else 0 : ends[token]]
            if share is None:
                drawn.append(piece)
            elif coloured:
                drawn.append(piece, next((style for floor, style in SHADES if share[token] > floor), "dim"))
            else:
                drawn.append(piece if share[token] >= 0.5 else "".join(c if c.isspace() else "·" for c in piece))
        drawn.append("\n")
    return drawn
