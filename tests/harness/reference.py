"""lm-eval by itself: its own task objects over local files, and its own Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcli.evals.harness import package

SHARED = Path(__file__).parents[3] / "shared"
NO_HARNESS = "lm-eval is not installed (pip install 'kvcli[lm-eval]')"
SUBJECT = "anatomy"


def shared(part: str) -> Path:
    """A folder beside the repository, or a skip."""
    if not (SHARED / part).is_dir():
        pytest.skip(f"no {SHARED / part}")
    return SHARED / part


def first_rows(scratch: Path, most: int = 150) -> Path:
    """gsm8k, mmlu and arc_challenge as they are, but for the length of gsm8k's splits: lm-eval fills in templates for
    all rows up to the last one that is asked."""
    data, folder = shared("data"), scratch / "data"
    for split in ("test", "train"):
        write(folder / "gsm8k" / f"{split}.jsonl", lines(data / "gsm8k" / f"{split}.jsonl")[:most])
    for name in ("mmlu", "arc_challenge"):
        (folder / name).symlink_to(data / name)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own_files(name: str, data: Path, scratch: Path) -> dict[str, str]:
    """The splits lm-eval asks for as files of `datasets`' json loader. arc_challenge is asked without shots: any rows
    may stand for its train split, which ../shared lacks."""
    if name.startswith("mmlu_"):
        subject = name.removeprefix("mmlu_")
        return {
            split: str(
                write(
                    scratch / f"{subject}_{split}.jsonl",
                    [row for row in lines(data / "mmlu" / f"{split}.jsonl") if row["subject"] == subject],
                )
            )
            for split in ("test", "dev")
        }
    folder = data / name.removesuffix("_cot")
    wanted = ("test", "train", "validation")
    found = {split: folder / f"{split}.jsonl" for split in wanted}
    stand_in = next(path for path in found.values() if path.is_file())
    wanted = ("test", "train") if name.startswith("gsm8k") else wanted
    return {split: str(found[split] if found[split].is_file() else stand_in) for split in wanted}


def own_task(name: str, shots: int, data: Path, scratch: Path) -> Any:
    """The task as lm-eval makes it from its file, its data set replaced by local files as its guide says."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = package.definition(name)
    assert path is not None
    config = load_yaml(path, resolve_func=True)
    files = {"data_files": own_files(name, data, scratch), "cache_dir": str(scratch / "cache")}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "num_fewshot": shots}
    config.pop("tag", None)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return task


def prompts(task: Any) -> dict[str, str]:
    """Sample id to prompt, of a run over all samples."""
    return {str(instance.doc_id): instance.args[0] for instance in task.instances}


def judged(task: Any, lm: Any, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """lm-eval's own run of these samples: metrics per `metric,filter`, and the raw responses under `resps`."""
    kept = [instance for instance in task.instances if str(instance.doc_id) in ids]
    for instance in kept:
        instance.resps.clear()
    kind = kept[0].request_type
    for instance, response in zip(kept, getattr(lm, kind)(kept, disable_tqdm=True), strict=True):
        instance.resps.append(response)
    task._instances = kept
    task.apply_filters()
    found: dict[str, dict[str, Any]] = {}
    for number in ids:
        mine = sorted((i for i in kept if str(i.doc_id) == number), key=lambda i: i.idx)
        found[number] = {"resps": [i.resps[0] for i in mine]}
        for name in mine[0].filtered_resps:
            metrics = task.process_results(mine[0].doc, [i.filtered_resps[name] for i in mine])
            found[number] |= {f"{metric},{name}": value for metric, value in metrics.items()}
    return found
