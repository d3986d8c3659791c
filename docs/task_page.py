"""Writes docs/tasks.md, the page of all tasks, from their definitions.

python docs/task_page.py           writes it
python docs/task_page.py --check   changes nothing; exit code 1 where it is not up to date
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from kvcli.cli.task_lists import TYPES, about
from kvcli.evals import loader
from kvcli.evals.rows import RowTask
from kvcli.evals.schema import hints_of, is_scalar, to_text
from kvcli.evals.settings import FIXED, kind_of, settings_of
from kvcli.evals.spec import Task

PAGE = Path(__file__).resolve().parent / "tasks.md"
ANSWERS = {"gen": "written", "mc": "chosen"}
NO_SUITE = "in no suite"
SHORT = 40

HEAD = """\
# Tasks

Every task that comes with kvcli. This page is written by `python docs/task_page.py` from the definitions in `tasks/`,
whose first lines say how prompts and scores are made and after whom; `kvcli list tasks NAME` prints them. Your own:
[adding a task](adding-a-task.md). The paper's grids: [presets](presets.md).

```
kvcli list tasks
kvcli list tasks gsm8k
kvcli sweep --model llama3-8b --task kvfundabench --method tier1 --ratio 0.3 --limit 20
kvcli sweep --model llama3-8b --task 'mgsm_*,gsm8k:shots=4' --method snapkv --ratio 0.3
```

| `--task` | what it names |
| --- | --- |
| `gsm8k`, `lg-gsm8k` | one task; hyphens count as underscores |
| `kvfundabench` | a suite: all its tasks |
| `'mgsm_*'` | all tasks whose names fit |
| `./mine.yaml` | a task of your own |
| `lm_eval:arc_easy` | a task of an installed lm-evaluation-harness (`pip install 'kvcli[lm-eval]'`) |
| any of them with `:KEY=VALUE,...` | the same with other settings; a piece with `KEY=` belongs to the one before |

A task with settings is a task of its own in records and tables, under one canonical name: settings sorted, those that
equal the definition's left out (`niah:depth=0.5,length=8192`). Its samples come in the same order under all settings.
`shots=N`, which every task takes, says how many examples it has where `--shots` says nothing, and is no part of the
name.

Rows come from the hub, from its local cache (`kvcli prefetch` fills it), or from `--data-dir`. Data sets on the hub
are read at their newest commit unless a definition has a line `revision: COMMIT`; tasks with that setting take
`:revision=COMMIT` too.

In the tables: shots, how answers are given (written by the model, or chosen among options by log-likelihood), the
metric, the score of guessing (`-`: unknown), and the data set on the hub (`-`: none, or one that the task generates).
"""


def page() -> str:
    tasks = [loader.load_task(name) for name in loader.own_names()]
    groups: dict[tuple[str, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.suites, []).append(task)
    parts = [HEAD, "## Suites\n", suites(tasks), "## All tasks\n"]
    for names in sorted(groups, key=lambda names: (not names, names)):
        parts += [f"### {' and '.join(names) or NO_SUITE}\n", table(groups[names])]
    return "\n".join([*parts, settings(tasks)])


def suites(tasks: list[Task]) -> str:
    lines = ["| suite | tasks | which |", "| --- | --- | --- |"]
    for suite, names in loader.suites().items():
        lines.append(f"| `{suite}` | {len(names)} | {joined(names, tasks)} |")
    return "\n".join(lines) + "\n"


def table(tasks: list[Task]) -> str:
    lines = ["| task | what it is | shots | answers | metric | guessing | data set |", "| --- " * 7 + "|"]
    for task in tasks:
        chance = "-" if task.chance is None else f"{task.chance:g}"
        names = [str(getattr(task, key, None) or "") for key in ("dataset_path", "dataset_name")]
        data = f"`{' '.join(filter(None, names))}`" if names[0] else "-"
        harmful = ", harmful prompts" if task.harmful else ""
        what = f"{sentence(task)}; {task.ability}{harmful}" if sentence(task) else task.ability + harmful
        how = ANSWERS[TYPES[task.output_type]]
        lines.append(f"| `{task.name}` | {cell(what)} | {task.shots} | {how} | {task.metric} | {chance} | {data} |")
    return "\n".join(lines) + "\n"


def sentence(task: Task) -> str:
    """The first sentence of a definition's remarks, without its full stop."""
    first = " ".join(about(Path(task.source)).split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", first, maxsplit=1)[0]


def settings(tasks: list[Task]) -> str:
    """Settings of tasks that compute their prompts, class by class."""
    facts = {f.name for f in dataclasses.fields(Task)} | set(FIXED)
    rows = [f.name for f in dataclasses.fields(RowTask) if f.name not in facts]
    common = sorted(name for name in rows if is_scalar(hints_of(RowTask)[name]))
    lines = [
        "## Settings\n",
        f"Tasks described by their YAML file alone take {', '.join(f'`{name}`' for name in common)},",
        "with the meaning that the key of the same name has ([adding a task](adding-a-task.md)). Those that compute",
        "their prompts take these, and some of the above (`kvcli list tasks NAME` shows all that one takes):\n",
        "| tasks | setting | takes | is, where nothing is said |",
        "| --- | --- | --- | --- |",
    ]
    classes: dict[str, list[Task]] = {}
    for task in tasks:
        if type(task) is not RowTask:
            classes.setdefault(f"{type(task).__module__}.{type(task).__qualname__}", []).append(task)
    for members in classes.values():
        names = joined([task.name for task in members], tasks)
        for setting in settings_of(members[0]):
            values = {shown(settings_of(task)[setting]) for task in members}
            value = values.pop() if len(values) == 1 else "each its own"
            if setting not in common:
                lines.append(f"| {names} | `{setting}` | {cell(kind_of(members[0], setting))} | {cell(value)} |")
    return "\n".join(lines) + "\n"


def joined(names: list[str], tasks: list[Task]) -> str:
    """Names in code; a family that is there whole as its pattern."""
    out = []
    for prefix in sorted({name.partition("_")[0] for name in names}):
        family = [task.name for task in tasks if task.name.startswith(f"{prefix}_")]
        mine = [name for name in names if name.partition("_")[0] == prefix]
        whole = len(family) > 2 and set(family) <= set(names)
        out += [f"{prefix}_*", *(n for n in mine if n not in family)] if whole else mine
    return ", ".join(f"`{name}`" for name in out)


def shown(value: object) -> str:
    text = to_text(value)
    if not text.isprintable() or len(text) > SHORT:
        return "a text"
    return f"`{text}`" if text.strip() else "-"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    new = page()
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == new
    if not arguments:
        PAGE.write_text(new, encoding="utf-8")
    if not same:
        sys.stdout.write(f"{PAGE.name}: {'not up to date: python docs/task_page.py' if arguments else 'written'}\n")
    return int(bool(arguments) and not same)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
