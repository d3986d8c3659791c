"""kvcli show: one prompt with the tokens each method kept, and all outputs side by side."""

from __future__ import annotations

import shlex
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.analysis import names
from kvcli.cli import output
from kvcli.errors import KvcliError, unknown
from kvcli.grammar import parse_methods, parse_ratios, ratio_text
from kvcli.results import store

if TYPE_CHECKING:
    from rich.text import Text

MOST_MAPS = 4
SHADES = ((0.75, "black on #3fb950"), (0.5, "on #238746"), (0.25, "on #1b5e32"), (0.0, "on #12351f"))
"""Style of a token by the share of layers and KV heads that kept it; dim where none did."""

Record = dict[str, Any]


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A result folder, its name or a unique beginning of it.")],
    task: Annotated[str | None, typer.Option("--task", help="The task; without it: what there is.")] = None,
    sample: Annotated[str | None, typer.Option("--sample", help="The sample's id; without it: all ids.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Only these methods, and full.")] = None,
    ratio: Annotated[list[str] | None, typer.Option("--ratio", help="Only these kept ratios, and full.")] = None,
    long: Annotated[bool, typer.Option("--long", help="Print outputs whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print one prompt with kept tokens marked and all outputs.

    Examples:
      kvcli show runs/demo
      kvcli show runs/demo --task tb_recall
      kvcli show runs/demo --task tb_recall --sample ID --method snapkv --ratio 0.1
    """
    methods = [str(m) for m in parse_methods(method or [])]
    ratios = parse_ratios(ratio or [])
    folder = store.find_run(run)
    if task is None:
        _show_tasks(folder, methods, ratios, as_json)
    elif sample is None:
        _show_samples(folder, task.replace("-", "_"), methods, ratios, as_json)
    else:
        facts = facts_of_sample(folder, task.replace("-", "_"), sample, methods, ratios)
        output.json_result(facts) if as_json else _show_sample(folder, facts, long)


# --- what there is ----------------------------------------------------------------------------------------------------


def _show_tasks(folder: Path, methods: list[str], ratios: list[Decimal], as_json: bool) -> None:
    found: dict[str, dict[str, dict[str, None]]] = {}
    records = store.read_records(folder, ("task", "method", "ratio"))
    for record in _filtered(records, "task", methods, ratios, f"kvcli show {folder}"):
        facts = found.setdefault(record["task"], {"samples": {}, "cells": {}, "methods": {}})
        for name, value in (("samples", "sample_id"), ("cells", "cell_id"), ("methods", "method")):
            facts[name][record[value]] = None
    rows = [(task, len(f["samples"]), len(f["cells"]), list(f["methods"])) for task, f in found.items()]
    headers = ("task", "samples", "cells", "methods")
    if as_json:
        output.json_result([dict(zip(headers, row, strict=True)) for row in rows])
        return
    output.result(output.table(headers, [(*row[:3], " ".join(row[3])) for row in rows]))
    if rows:
        output.next_command(f"kvcli show {folder} --task {rows[0][0]}{_options(methods, ratios)}")


def _show_samples(folder: Path, task: str, methods: list[str], ratios: list[Decimal], as_json: bool) -> None:
    rows: dict[str, dict[str, Any]] = {}
    records = _records_of(folder, task, ("score", "method", "ratio"))
    for record in _filtered(records, "sample_id", methods, ratios, f"kvcli show {folder} --task {task}"):
        row = rows.setdefault(record["sample_id"], {"sample": record["sample_id"], "cells": 0, "scores": []})
        row["cells"] += 1
        row["scores"] += [record["score"]] if record["score"] is not None else []
    samples = []
    for name, row in rows.items():
        scores = row.pop("scores")
        marked = store.map_path(folder, task, name, "any").parent.is_dir()
        samples.append({**row, "mean_score": sum(scores) / len(scores) if scores else None, "kept_marked": marked})
    samples.sort(key=lambda s: not s["kept_marked"])
    if as_json:
        output.json_result(samples)
        return
    listed = [(s["sample"], s["cells"], _short(s["mean_score"]), "yes" if s["kept_marked"] else "no") for s in samples]
    output.result(output.table(("sample", "cells", "mean score", "kept tokens stored"), listed))
    more = _options(methods, ratios)
    output.next_command(f"kvcli show {folder} --task {task} --sample {samples[0]['sample']}{more}")


def _filtered(records: list[Record], by: str, methods: list[str], ratios: list[Decimal], listing: str) -> list[Record]:
    """The wanted records and full's beside them, of the tasks or samples that have a wanted one."""
    if not methods and not ratios:
        return records
    there = {record[by] for record in records if _named(record, methods, ratios)}
    if not there:
        given = _options(methods, ratios).strip()
        raise KvcliError("no such cell in this folder", given=given, fix=f"{listing} shows what there is")
    return [record for record in records if record[by] in there and _wanted(record, methods, ratios)]


def _options(methods: list[str], ratios: list[Decimal]) -> str:
    """The filter as typed, for the next command."""
    options = [("--method", m) for m in methods] + [("--ratio", ratio_text(r)) for r in ratios]
    return "".join(f" {shlex.join(option)}" for option in options)


def _records_of(folder: Path, task: str, fields: tuple[str, ...] | None) -> list[Record]:
    """The task's records; all fields with None. Raises KvcliError when there are none."""
    records = store.read_records(folder, None if fields is None else ("task", *fields))
    found = [record for record in records if record["task"] == task]
    if not found:
        names = {str(record["task"]) for record in records}
        raise unknown("task in this folder", task, names, given=f"--task {task}", listing=f"kvcli show {folder}")
    return found


# --- one sample -------------------------------------------------------------------------------------------------------


def facts_of_sample(folder: Path, task: str, sample: str, methods: list[str], ratios: list[Decimal]) -> dict[str, Any]:
    """The prompt and, per cell, its output, scores and the share of layers and heads that kept each token.

    One sample can have several prompts (other shots or shot seed): then `prompts` holds those facts for each of them.
    """
    every = _records_of(folder, task, None)
    records = [record for record in every if record["sample_id"] == sample]
    if not records:
        known = {record["sample_id"] for record in every}
        listing = f"kvcli show {folder} --task {task}"
        raise unknown("sample", sample, known, given=f"--sample {sample}", listing=listing)
    chosen = [record for record in records if _wanted(record, methods, ratios)]
    if not any(_named(record, methods, ratios) for record in records):
        cells = sorted({f"{r['method']} {_size(r)}" for r in records})
        given = f"--sample {sample}{_options(methods, ratios)}"
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
    return {
        "prompt_sha": sha, "shots": records[0]["shots"], "shot_seed": which[0], "shot_order": which[1],
        "target": target, "prompt": prompts.get(sha) if sha else None,
        "cells": [{**_cell(record), "kept_share": _share(folder, record)} for record in records],
    }  # fmt: skip


def _wanted(record: Record, methods: list[str], ratios: list[Decimal]) -> bool:
    return record["method"] == "full" or _named(record, methods, ratios)


def _named(record: Record, methods: list[str], ratios: list[Decimal]) -> bool:
    sized = not ratios or (record["ratio"] is not None and Decimal(str(record["ratio"])) in ratios)
    return sized and (not methods or not names.spellings(record["method"]).isdisjoint(methods))


def _cell(record: Record) -> dict[str, Any]:
    fields = (
        "cell_id", "method", "ratio", "budget", "measured_ratio", "first_token", "query", "shots", "seed", "draw",
        "decode", "weights", "match", "status", "error",
        "score", "extracted", "output", "finish", "flags", "n_prompt", "kept", "kept_by_region",
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
        _show_prompt(group, long)
    kept = any(cell["kept_share"] and cell["method"] != "full" for group in groups for cell in group["cells"])
    if kept and not output.colours():
        output.note("· = fewer than half of the layers and KV heads kept the token (a terminal shows the share)")
    output.next_command(f"kvcli report {folder}")


def _label(group: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """Its shots, and what else tells it from the sample's other prompts."""
    shots = "shots not recorded" if group["shots"] is None else f"{group['shots']} shot{'s' * (group['shots'] != 1)}"
    parts = [shots]
    if len({g["shot_seed"] for g in groups}) > 1:
        parts.append(f"shot seed {group['shot_seed']}")
    if len({g["shot_order"] for g in groups}) > 1:
        parts.append(f"shot order {group['shot_order']}")
    if sum(all(g[n] == group[n] for n in ("shots", "shot_seed", "shot_order")) for g in groups) > 1:
        parts.append(f"prompt {(group['prompt_sha'] or 'not recorded')[:12]}")
    return ", ".join(parts)


def _show_prompt(facts: dict[str, Any], long: bool) -> None:
    maps = [cell for cell in facts["cells"] if cell["kept_share"] and cell["method"] != "full"]
    prompt = facts["prompt"]
    if prompt is None or prompt.get("text") is None:
        output.note("the prompt's text is not stored (prompts of harmful tasks: sweep --store-prompts)")
    elif not maps:
        output.result(_marked(prompt, None))
        output.note("kept tokens are stored for the first samples of each task only (sweep --keep-maps N)")
    for cell in maps[:MOST_MAPS] if prompt and prompt.get("text") is not None else []:
        mean = sum(cell["kept_share"])
        output.result(f"{_name(cell)}: {mean:.1f} of {cell['n_prompt']} tokens kept (mean over layers and KV heads)")
        output.result(_marked(prompt, cell["kept_share"]))
    output.result(f"target: {facts['target']}")
    headers = ("method", "size", "measured", "score", "answer", "flags", "output")
    output.result(output.table(headers, [_row(cell, long) for cell in facts["cells"]]))
    if len(maps) > MOST_MAPS:
        output.note(f"{MOST_MAPS} of {len(maps)} kept sets shown: --method and --ratio choose others")


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
    return ", ".join([*parts, *[f"draw {cell['draw']}"] * bool(cell.get("draw"))])


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


def _row(cell: dict[str, Any], long: bool) -> tuple[Any, ...]:
    text = cell["output"] if cell["status"] == "ok" else f"failed: {cell['error']}"
    text = text or ""
    if not long:
        text = " ".join(text.split())
        text = text if len(text) <= 100 else text[:97] + "..."
    measured, score = _short(cell["measured_ratio"]), _short(cell["score"])
    extras = [names.decoding(cell.get("decode")), _weights(cell), _told_apart(cell)]
    method = " ".join(filter(None, [cell["method"], *(f"[{x}]" for x in extras if x)]))
    return method, _size(cell), measured, score, cell["extracted"], " ".join(cell["flags"] or []) or "-", text


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
