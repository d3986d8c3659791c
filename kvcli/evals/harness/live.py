"""lm-eval's own task object over kvcli's rows: it builds the prompts, kvcli finds the shots in them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvcli import hub
from kvcli.errors import KvcliError
from kvcli.evals.data import DataSet, Row, find_folder, read_split, reordered, split_file
from kvcli.evals.harness import package
from kvcli.spans import Segment

OWN_SEED = 1234
"""`DEFAULT_OTHER_SEED` of lm-eval's `defaults.py`: the seed of its shots unless a user gives another."""
UNASKED = ("exact_match", "acc_mutual_info")
"""Metrics of choices that need more than the log-likelihoods of the options behind the prompt."""
WHOLE = ("all", "default")
"""Configurations that are a data set's all rows."""


@dataclass(frozen=True)
class Asked:
    """One question. options: with the blank each begins with; empty where text is generated.

    spans: what is known of the prompt: `shots`, `context` (all but the question is one piece) or `none`.
    """

    number: int
    doc: Any
    segments: tuple[Segment, ...]
    options: tuple[str, ...]
    spans: str


@dataclass
class Live:
    """An lm-eval task with its data."""

    name: str
    task: Any
    turns: list[str]
    """What its builder made of each turn of the last prompt: the shots, then the question."""

    @property
    def task_docs(self) -> Any:
        return self.task.task_docs

    @property
    def chooses(self) -> bool:
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")

    def ask(self, numbers: set[int], shots: int, shot_seed: int, shot_order: int) -> dict[int, Asked]:
        """The questions of these numbers with the shots that a run over all questions gives them.

        The sampler draws for those in between too. Raises KvcliError where it cannot, or for a prompt of several texts.
        """
        self.task.set_fewshot_seed(shot_seed or OWN_SEED)
        asked = {}
        with self._building(f"--shots {shots}"), self._shots_in(shot_order):
            for number in range(max(numbers, default=-1) + 1):
                if number in numbers:
                    asked[number] = self._asked(number, shots)
                elif shots:
                    self._skip(number, shots)
        return asked

    def gold(self, doc: Any) -> Any:
        """The right option's index (of several the first; -1 where it is none of them), or the right text or texts."""
        target = self.task.doc_to_target(doc)
        choices = self.task.doc_to_choice(doc) if self.task.config.doc_to_choice is not None else None
        if not self.chooses:
            target = choices[target] if choices is not None and isinstance(target, int) else target
            return [str(t) for t in target] if isinstance(target, list) else str(target)
        target = target[0] if isinstance(target, list) and target else target
        if isinstance(target, str):
            target = choices.index(target) if choices and target in choices else -1
        return int(target) if isinstance(target, int) else -1

    def _asked(self, number: int, shots: int) -> Asked:
        doc = self.task_docs[number]
        self.turns.clear()
        prefix = self.task.doc_to_prefix(doc)
        prompt = self.task.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix)
        if not isinstance(prompt, str):
            raise self._error("each of its options has a prompt of its own")
        segments, spans = cut(prompt, self.turns, shots, self.task.doc_to_text(doc))
        requests = self.task.construct_requests(doc=doc, ctx=prompt, metadata=(self.name, number, 1))
        if not self.chooses:
            return Asked(number, doc, segments, (), spans)
        if any(request.args[0] != prompt for request in requests):
            raise self._error("its options stand behind different prompts")
        options = tuple(request.args[1] for request in requests)
        return Asked(number, doc, segments, options, spans)

    def _skip(self, number: int, shots: int) -> None:
        """Draws the shots of a question that is not asked, as `fewshot_context` does."""
        same = self.task.fewshot_cfg.split == self.task.config.test_split
        self.task.sampler.sample(n=shots, eval_doc=self.task_docs[number] if same else None)

    @contextlib.contextmanager
    def _shots_in(self, order: int) -> Iterator[None]:
        sampler = getattr(self.task, "sampler", None)
        if order == 0 or sampler is None:
            yield
            return
        draw = sampler.sample
        sampler.sample = lambda *args, **kwargs: reordered(draw(*args, **kwargs), order)
        try:
            yield
        finally:
            del sampler.sample

    @contextlib.contextmanager
    def _building(self, given: str) -> Iterator[None]:
        """A task's own code and data may fail in any way: one line."""
        try:
            with package.quiet():
                yield
        except KvcliError:
            raise
        except Exception as e:
            raise self._error(f"{type(e).__name__}: {_first_line(e)}", given) from e

    def _error(self, why: str, given: str = "") -> KvcliError:
        what = f"lm-eval cannot build the prompts of '{self.name}': {why}"
        return KvcliError(
            what, given=f"--task {self.name} {given}".strip(), fix="another number of --shots, or another task"
        )


def cut(prompt: str, turns: Sequence[str], shots: int, question: Any) -> tuple[tuple[Segment, ...], str]:
    """The prompt in segments, and what was found: `shots` where the builder's turns make up the prompt's end.

    What stands before the turns is the description. Otherwise all before the question's own text is context.
    """
    joined = "".join(turns)
    if len(turns) == shots + 1 and prompt.endswith(joined):
        front = prompt[: len(prompt) - len(joined)]
        segments = [Segment(front, "system")] if front else []
        segments += [Segment(text, "shot", i) for i, text in enumerate(turns[:-1])]
        return (*segments, Segment(turns[-1], "question")), "shots"
    if isinstance(question, str) and question and prompt.endswith(question) and prompt != question:
        front = prompt[: len(prompt) - len(question)]
        return (Segment(front, "context"), Segment(question, "question")), "context"
    return (Segment(prompt, "question"),), "none"


def opened(name: str, config: Mapping[str, Any], shots: int, data_dir: str | None) -> Live:
    """The task over the rows of --data-dir, or of its own source. Raises KvcliError for data that cannot be had."""
    plain = str(config["task"])
    data = DataSet(plain, config.get("dataset_path"), config.get("dataset_name"))
    own = callable(config.get("custom_dataset"))
    splits = None if own or data_dir is None else _Splits(data, data_dir)
    reason = ""
    if splits is None and not own and data.path and not data.path.startswith((".", "/", "~")):
        import datasets  # noqa: F401 - so that `offline` reaches it too

        reason = hub.unreachable("dataset", data.path, None)
    turns: list[str] = []
    try:
        with package.supported(), package.quiet(), hub.offline() if reason else contextlib.nullcontext():
            task = _recording()(copy.deepcopy(dict(config)), splits, bool(shots), turns)
    except KvcliError:
        raise
    except Exception as e:  # whatever datasets and the task's own functions raise
        given = f"--task {name}" + (f" --data-dir {data_dir}" if data_dir is not None else "")
        source = f": {reason}" if reason else f": {type(e).__name__}: {_first_line(e)}"
        what = f"lm-eval cannot open the data of '{plain}'{source}"
        fix = f"--data-dir DIR with {data.folder_names()[0]}/SPLIT.jsonl in it"
        raise KvcliError(what, given=given, fix=fix) from e
    if task.OUTPUT_TYPE == "multiple_choice":
        for metric in UNASKED:
            task._metric_fn_list.pop(metric, None)
    return Live(name, task, turns)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


class _Splits(dict[str, Any]):
    """Splits as `datasets` tables, read from --data-dir when lm-eval asks for them."""

    def __init__(self, data: DataSet, data_dir: str) -> None:
        super().__init__()
        self.data, self.data_dir = data, data_dir
        find_folder(data, data_dir)

    def __missing__(self, split: str) -> Any:
        import datasets

        rows = _of_configuration(read_split(self.data, split, self.data_dir), self.data, split, self.data_dir)
        try:
            table = datasets.Dataset.from_list([row.values for row in rows])
        except Exception as e:  # pyarrow's errors have no common class of their own
            path = split_file(self.data, split, self.data_dir)
            what = f"{path}: its rows do not make a table: {_first_line(e)}"
            raise KvcliError(
                what, given=f"--data-dir {self.data_dir}", fix="give each field one type in all rows"
            ) from e
        self[split] = table
        return table


def _of_configuration(rows: list[Row], data: DataSet, split: str, data_dir: str) -> list[Row]:
    """Of a file that holds all subjects of a data set (mmlu's `all`), those of the wanted one.

    A file of the configuration's own (`NAME/test.jsonl`, `NAME_test.jsonl`) is taken as it is. Raises KvcliError where
    rows name their subject and none is the wanted one: all of them would be another task.
    """
    path = split_file(data, split, data_dir)
    whole = data.name is None or data.name in WHOLE or path.name != f"{split}.jsonl" or path.parent.name == data.name
    if whole or not any("subject" in row.values for row in rows):
        return rows
    mine = [row for row in rows if row.values.get("subject") == data.name]
    if not mine:
        what = f"{path}: no row has the subject '{data.name}' (field 'subject')"
        fix = f"put its rows into {path.parent / str(data.name)}/{split}.jsonl, or name the subject in them"
        raise KvcliError(what, given=f"--task {data.task} --data-dir {data_dir}", fix=fix)
    return mine


@cache
def _recording() -> Callable[..., Any]:
    """lm-eval's task class, over given splits and noting each turn it builds."""
    from lm_eval.api.task import ConfigurableTask

    class Recording(ConfigurableTask):  # type: ignore[misc, unused-ignore]
        def __init__(self, config: dict[str, Any], splits: Any, shots: bool, turns: list[str]) -> None:
            self.splits, self.shots, self.turns = splits, shots, turns
            super().__init__(config=config)

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **rest: Any) -> None:
            if self.splits is None:
                super().download(dataset_kwargs, **rest)
            else:
                self.dataset = self.splits

        def fewshot_docs(self) -> Any:
            return super().fewshot_docs() if self.shots else None

        def build_qa_turn(self, **parts: Any) -> Any:
            messages = super().build_qa_turn(**parts)
            self.turns.append("".join(message.to_text() for message in messages))
            return messages

    return Recording
