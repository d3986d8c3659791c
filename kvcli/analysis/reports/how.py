"""How a run was measured, where it comes from and how to make it again, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcli.analysis.marked import Bullets, Command, Grid, Paragraph, Section, code, section, user
from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Run
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import DENSE, TaskTable

FIRST_TOKEN = {
    "compressed": "the first answer token is computed through the compressed cache, like all others",
    "prefill": "the first answer token comes from the prefill, before anything was evicted",
    "n/a": "the method drops tokens while it reads the prompt, so the two ways cannot be told apart",
}


_MODEL = {
    "revision": "revision", "dtype": "number format", "tokenizer": "tokenizer:", "parameters": "parameters",
    "layers": "layers", "heads": "query heads", "kv_heads": "KV heads", "context": "longest context",
}  # fmt: skip
"""Facts of run.json that a reader wants first, in words."""


def how_section(run: Run, tables: Sequence[TaskTable]) -> Section:
    """How it was measured."""
    facts = {k: v for part in ("identity", "model") for k, v in flat(run.meta.get(part))}
    known = ", ".join(f"{words} {user(grouped(facts[k]))}" for k, words in _MODEL.items() if k in facts)
    lines = [f"Model: {code(run.model)}" + (f" ({known})" if known else "") + "."]
    for first_token in dict.fromkeys(t.first_token for t in tables):
        meaning = FIRST_TOKEN.get(first_token, "")
        lines.append(f"First token {code(first_token)}" + (f": {meaning}." if meaning else "."))
    for query in dict.fromkeys(t.query for t in tables):
        seen = "was" if query == "aware" else "was not"
        lines.append(f"Query {code(query)}: the question {seen} visible to the compression.")
    found = names.files(cell.method for cell in run.cells)
    lines += [f"Method {code(name)}: {code(source)}." for name, source in found.items()]
    lines += _weights(run, tables)
    first = {(t.task, t.shots): t for t in reversed(tables)}
    lines += [f"{code(t.task)}: {task_facts(t)}." for t in reversed(first.values())]
    if len({(t.task, t.shots) for t in tables}) < len({(t.task, t.shots, t.shot_seed, t.shot_order) for t in tables}):
        lines.append(
            "Other exemplars (shot seed) and other orders of them stand in tables of their own, never averaged."
        )
    lines += [
        "Measured ratio: bytes kept over bytes of the 16-bit full cache; noop samples stay in every mean and are "
        "counted in the tables.",
        "Scores: Wilson interval (0/1 scores) or t interval. Differences: same samples with and without compression; "
        "Tango's paired score interval and mid-p McNemar for 0/1 scores, BCa bootstrap for graded ones, t over "
        "clusters where samples belong together (docs/statistics.md).",
    ]
    if any(cell.seeds > 1 for table in tables for cell in table.cells()):
        lines.append("Seeds and draws of one method are averaged within each sample first; n counts samples.")
    return section("how", "How it was measured", Bullets.of(lines))


def _weights(run: Run, tables: Sequence[TaskTable]) -> list[str]:
    """What was pruned, on which texts, and that such results stand apart."""
    measured = run.meta.get("weights")
    lines = []
    for weights in dict.fromkeys(t.weights for t in tables if t.weights != DENSE):
        facts = measured.get(weights, {}) if isinstance(measured, dict) else {}
        said = f": {_pruned(facts)}" if facts else ""
        lines.append(f"Weights {code(weights)}{said}. Its tables stand apart; their differences are to full with "
                     "these weights.")  # fmt: skip
    return lines


def _pruned(facts: Mapping[str, Any]) -> str:
    file = facts["calibration"]["file"]
    texts = f"{facts['texts']} texts ({facts['tokens']:,} tokens) of {user(file) if file else 'its own language'}"
    return (
        f"{100 * facts['sparsity']:.2f} % of the {facts['parameters']:,} weights in {facts['matrices']} matrices are "
        f"zero ({100 * facts['of_model']:.1f} % of the model), calibrated on {texts}"
    )


def task_facts(table: TaskTable) -> str:
    parts = [
        user(table.ability or ""), user(table.metric or ""), f"version {user(table.version)}" if table.version else "",
        wording.shots(table.shots) if table.shots is not None else "",
        f"shot seed {table.shot_seed}" if table.shot_seed else "",
        f"shot order {table.shot_order}" if table.shot_order else "", f"n = {wording.sample_range(table)}",
        wording.clusters(table),
        f"median prompt {table.n_prompt:.0f} tokens" if table.n_prompt is not None else "",
        f"chance {wording.score(table.chance)}" if table.chance is not None else "",
        f"published {table.reference:g}" if table.reference is not None else "",
        f"{table.too_long} prompts too long, left out" if table.too_long else "",
        f"{table.truncated} prompts cut by --truncate" if table.truncated else "",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def table_facts(table: TaskTable) -> str:
    """What stands above a table: of the task, then of the mode."""
    return f"{task_facts(table)}; {user(wording.mode(table, with_shots=False))}."


def provenance_section(run: Run) -> Section:
    parts = ("provenance", "identity", "model", "schema", "status", "created", "updated")
    facts = flat({k: run.meta[k] for k in parts if k in run.meta})
    grid = Grid(("what", "value"), [[user(k), user(v)] for k, v in map(worded, facts)]) if facts else None
    torn = f"Torn last lines (not written, the same command repeats them): {user(', '.join(run.torn))}."
    said, commands = repeated(run)
    return section(
        "provenance", "Provenance", Paragraph(said), Command("\n".join(commands)) if commands else None,
        Paragraph(torn) if run.torn else None, grid,
    )  # fmt: skip


_WORDS = {
    "schema": "version of the record table", "provenance.git.commit": "commit of kvcli",
    "provenance.git.dirty": "kvcli changed since that commit", "provenance.hardware.cpu": "processor",
    "provenance.hardware.cores": "processor cores", "provenance.hardware.memory_gib": "memory (GiB)",
    "provenance.hardware.system": "operating system", "model.kv_heads": "KV heads of a layer",
    "model.heads": "query heads of a layer", "model.context": "longest context (tokens)",
    "model.widths": "width of a head", "model.value_width": "width of a value", "identity.top_p": "top-p",
    "identity.template": "chat template", "identity.system": "system prompt", "identity.dtype": "number format",
    "identity.ignore_eos": "end of text ignored", "identity.max_new_tokens": "most new tokens",
    "identity.trust_remote_code": "code of the model's repository trusted",
}  # fmt: skip
_PLACES = ("provenance.versions.", "provenance.hardware.", "provenance.", "identity.", "model.")


def grouped(value: str) -> str:
    """'648,576'; what is no whole number as it is."""
    return f"{int(value):,}" if value.isdecimal() and len(value) > 4 else value


def worded(fact: tuple[str, str]) -> tuple[str, str]:
    """A fact of run.json in words: ('provenance.versions.torch', '2.13') is ('version of torch', '2.13')."""
    key, value = fact
    value = {"True": "yes", "False": "no"}.get(value, grouped(value) if key.startswith("model.") else value)
    if key in _WORDS:
        return _WORDS[key], value
    if key.startswith(_PLACES[0]):
        return f"version of {key.removeprefix(_PLACES[0])}", value
    place = next((p for p in _PLACES if key.startswith(p)), "")
    return key.removeprefix(place).replace(".", " ").replace("_", " "), value


FROM_PYTHON = ["python", "kvcli.sweep"]
"""What stands for a command in run.json where kvcli.sweep was called."""


def repeated(run: Run) -> tuple[str, tuple[str, ...]]:
    """How to make the run again: a sentence, and the commands that wrote it, each once, in their order."""
    every = [entry.get("argv") for entry in run.meta.get("commands") or []] or [run.meta.get("argv")]
    typed = [argv for argv in every if isinstance(argv, list) and len(argv) > 1 and argv != FROM_PYTHON]
    commands = tuple(dict.fromkeys(shlex.join(map(str, argv)) for argv in typed))
    passed = flat(run.meta.get("passed"))
    if commands:
        said = "The same command repeats or resumes this run"
        if len(commands) > 1:
            said = "These commands, in this order, repeat or resume this run"
        if len(typed) < len(every):
            said += "; calls from Python added to it too, see the grids under generations in run.json"
        return f"{said}{_moved(run, typed)}:", commands
    if passed:
        settings = ", ".join(f"{user(k)} = {user(v)}" for k, v in passed)
        if len(run.meta.get("generations") or ()) > 1:
            return f"Made by several calls from Python (generations in run.json); the last one: {settings}.", ()
        return f"Made from Python; the same settings repeat or resume it: {settings}.", ()
    return "run.json holds no command: this report was made from the records alone.", ()


def _moved(run: Run, typed: Sequence[Sequence[Any]]) -> str:
    """That the folder has another name by now than the commands give it: they would make a new one."""
    places = [str(argv[at + 1]) for argv in typed for at, word in enumerate(argv[:-1]) if word == "--out"]
    if not places or Path(places[-1]).name == run.name:
        return ""
    return f" (its folder was {code(places[-1])} and is {code(run.name)} now, which {code('--out')} has to name)"


def flat(values: Any, before: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text), in order; empty ones left out. Nothing for what is not a mapping."""
    out: list[tuple[str, str]] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{before}.{key}" if before else str(key)
        if isinstance(value, dict):
            out += flat(value, name)
        elif value not in (None, "", []):
            out.append((name, _listed(value) if isinstance(value, list) else str(value)))
    return out


def _listed(values: list[Any]) -> str:
    """'2 in each of 32 layers' where all are alike: facts per layer."""
    alike = len(values) > 2 and all(v == values[0] for v in values)
    return f"{values[0]} in each of {len(values)} layers" if alike else ", ".join(map(str, values))
