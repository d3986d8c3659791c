"""Exemplars that somebody wrote out, as the worked solutions of a paper: from a file of the user's, or from lm-eval."""

from __future__ import annotations

from dataclasses import dataclass

from kvcli.evals.data import DataSet, Row, find_folder, read_jsonl


@dataclass(frozen=True)
class Written:
    """rows: the exemplars; where: what they come from; absent: why there are none."""

    rows: tuple[Row, ...] = ()
    where: str = ""
    absent: str = ""


def written(data: DataSet, file: str | None, harness: str | None, data_dir: str | None) -> Written:
    """The rows of `file` in the data set's folder of --data-dir. Without --data-dir, where rows come from the hub, the
    `samples` that the installed lm-eval has in its task `harness`.

    Raises KvcliError for a folder or file that cannot be read, never for an absent file or package.
    """
    if data_dir is not None:
        path = find_folder(data, data_dir) / file if file else None
        if path is not None and path.is_file():
            return Written(tuple(read_jsonl(path)), str(path))
        return Written(where=str(path or ""), absent=f"there is no {path}" if path else "")
    if harness:
        return _of_harness(harness)
    return Written(where=file or "", absent=f"{file} is looked for only in --data-dir" if file else "")


def _of_harness(name: str) -> Written:
    from kvcli.evals.harness import package

    rows, absent = package.samples_of(name)
    where = f"lm-eval's {name}"
    return Written(tuple(Row(dict(v), i, f"{where} samples[{i}]") for i, v in enumerate(rows)), where, absent)


def remark(task: str, split: str, whose: str, why: str) -> str:
    """Said where exemplars come from a split although there are written ones, which the prompts of `whose` have."""
    return f"{task}: exemplars come from the {split} split, so the prompts are not those of {whose}: {why}"
