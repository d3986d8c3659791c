"""kvcli rescore: scores stored outputs again, without the model that wrote them; with --judge by another model."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli import output, rescore_table
from kvcli.grammar import split_tasks
from kvcli.results import store

if TYPE_CHECKING:
    from kvcli.engine.judging import Judge
    from kvcli.engine.rescoring import Folder, Tally


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A result folder, its name or a unique beginning of it.")],
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Only these tasks.", metavar="TASK", show_default=False)
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Data sets as local files \\[default: where the run read them].", show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A model of the Llama Guard family judges answers to harmful requests; none drops its verdicts.",
            metavar="MODEL", show_default=False,
        ),
    ] = None,
    judge_dtype: Annotated[str, typer.Option(help="Number format of the judge.")] = "auto",
    judge_device: Annotated[str, typer.Option(help="Where the judge runs.")] = "auto",
    unsafe_exec: Annotated[
        bool, typer.Option("--unsafe-exec", help="Run generated programs with plain limits where there is no sandbox.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:  # fmt: skip
    """Score stored outputs again, without the model.

    For a scorer or a right answer that was corrected. Records whose prompt is another one by now are left as they are.

    \b
    Examples:
      kvcli rescore runs/demo
      kvcli rescore runs/demo --task gsm8k --dry-run
      kvcli rescore runs/safety --judge meta-llama/Llama-Guard-3-8B
    """
    from kvcli import sandbox
    from kvcli.cli.running import quiet_libraries, typed
    from kvcli.engine.rescoring import open_folder, rescore

    quiet_libraries()
    path = store.find_run(run)
    names = tuple(split_tasks(task or ()))
    sandbox.configure(unsafe=unsafe_exec, warn=output.warn)
    folder = open_folder(path, data_dir=data_dir, tasks=names, say=output.note)
    model = _judge(judge, judge_dtype, judge_device)
    with output.progress("judge") as bar:
        tallies = rescore(
            folder, model, forget=judge == "none", dry_run=dry_run, argv=typed(),
            progress=lambda done, total, label: bar.update(done, total, task=label),
        )  # fmt: skip
    if as_json:
        output.json_result({"folder": str(path), "dry_run": dry_run, "judge": model and model.identity,
                            "methods": [_row(tally) for tally in tallies]})  # fmt: skip
        return
    _print(tallies, folder, dry_run)


def _judge(model: str | None, dtype: str, device: str) -> Judge | None:
    if model in (None, "none"):
        return None
    from kvcli.engine.checking import check_model_options
    from kvcli.engine.judging import load_judge

    check_model_options(dtype, "auto", "auto", None)
    return load_judge(str(model), dtype=dtype, device=device)


def _row(tally: Tally) -> dict[str, Any]:
    return {
        "task": tally.task, "method": tally.method, "records": tally.records, "changed": tally.changed,
        "told": tally.told,
        "score_before": tally.before / tally.records if tally.records else None,
        "score_after": tally.after / tally.records if tally.records else None, "left_out": dict(tally.left_out),
    }  # fmt: skip


def _print(tallies: list[Tally], folder: Folder, dry_run: bool) -> None:
    """The table and what it does not say. What comes next: the same in earnest, a report of the new scores, or figures
    where nothing changed since the last one."""
    from kvcli.cli.following import next_in
    from kvcli.cli.running import typed

    room = output.console()
    output.result(rescore_table.table(tallies, room.width if room.is_terminal or "COLUMNS" in os.environ else None))
    changed, records = sum(t.changed for t in tallies), sum(t.records for t in tallies)
    more = " would change" if dry_run else " changed"
    output.note(f"{changed} of {records} records{more}")
    told = sum(t.told for t in tallies)
    if told:
        output.note(
            f"{told:,} records {'would say' if dry_run else 'now say'} whether their output is text (incoherent)"
        )
    left = Counter({(t.task, why): 0 for t in tallies for why in t.left_out})
    for tally in tallies:
        left.update({(tally.task, why): count for why, count in tally.left_out.items()})
    for (task, why), count in left.items():
        output.warn(f"{task}: {count} record{'s' * (count != 1)} left as before: {why}")
    if dry_run and changed + told:
        output.next_command(shlex.join(word for word in typed() if word != "--dry-run"))
    else:
        next_in(folder.path, shlex.join(["kvcli", "plot", str(folder.path)]))
