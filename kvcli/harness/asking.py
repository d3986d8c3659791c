"""Runs requests of lm-eval through kvcli's engine: the same prefill, selection and decoding as `kvcli run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcli import __version__
from kvcli.config import SweepConfig
from kvcli.engine.cells import PromptKey, make_cells
from kvcli.engine.checking import check
from kvcli.engine.estimate import Sizes, rows_that_fit
from kvcli.engine.plan import MAX_DECODE_ROWS, Generation, make_plan
from kvcli.engine.prepare import cell_facts, prepare
from kvcli.engine.prompts import PromptSet
from kvcli.engine.reweighting import Models
from kvcli.engine.runner import Options, Runner
from kvcli.engine.session import DEFAULT_MEMORY, parse_memory
from kvcli.errors import KvcliError
from kvcli.harness.requests import Requests, request
from kvcli.models.prompt import build_prompt
from kvcli.weights.spec import DENSE


@dataclass
class _Records:
    """Keeps records in memory: lm-eval writes its own files."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def done_keys(self) -> set[tuple[str, str]]:
        return set()

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def add_prompt(self, entry: dict[str, Any]) -> None:
        pass

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Any) -> None:
        pass


class Engine:
    """One model under one method. Raises KvcliError for whatever `kvcli run` refuses."""

    def __init__(self, config: SweepConfig, delimiter: str) -> None:
        request = check(config)
        self.config, self.delimiter = request.config, delimiter
        self.prepared = prepare(dataclasses.replace(request, tasks=()), None)
        (self.cell,) = self._cells(Requests.of([]))
        self.model = Models(self.prepared, _unheard, _unheard, lambda: False).enter(DENSE)
        self.measured: list[float] = []

    @property
    def tokenizer(self) -> Any:
        return self.prepared.tokenizer

    @property
    def context(self) -> int | None:
        return self.model.shapes.context

    def facts(self) -> dict[str, Any]:
        """The method and what was really kept, for the results of lm-eval."""
        cell, kept = self.cell, self.measured
        return {
            "version": __version__, **self.prepared.identity, "method": cell.method, "ratio": cell.ratio,
            "budget": cell.budget, "first_token": cell.first_token, "query": cell.query, "decode": cell.decode,
            "seed": cell.seed, "measured_ratio": sum(kept) / len(kept) if kept else None,
        }  # fmt: skip

    def generate(
        self, prompts: Sequence[str], length: int, until: Sequence[str], temperature: float, top_p: float
    ) -> list[str]:
        samples = [request(i, prompt, self.delimiter) for i, prompt in enumerate(prompts)]
        task = Requests.of(samples, max_new_tokens=length, until=until)
        return [record["output"] for record in self._run(task, temperature=temperature, top_p=top_p)]

    def loglikelihoods(
        self, contexts: Mapping[str, Sequence[str]], greedy: bool
    ) -> dict[str, list[tuple[float, bool]]]:
        """Per context, for each of its continuations: its log-likelihood, and whether greedy decoding gives it."""
        if "" in contexts:
            what = "a continuation of nothing was asked for: there is no prompt to compress"
            fix = "tasks without acc_mutual_info, with a prompt before the options"
            raise KvcliError(what, given="--model kvcli", fix=fix)
        samples = [request(i, text, self.delimiter, options) for i, (text, options) in enumerate(contexts.items())]
        task = Requests.of(samples)
        built = self._prompts(task)
        records = self._run(task, built)
        best = self._greedy(built) if greedy else [[] for _ in samples]
        found = {}
        for text, prompt, record, ids in zip(contexts, built.prompts, records, best, strict=True):
            same = [bool(greedy) and ids[: len(option)] == list(option) for option in prompt.options]
            found[text] = list(zip(map(float, record["options"]), same, strict=True))
        return found

    def _greedy(self, built: PromptSet) -> list[list[int]]:
        """The ids that greedy decoding puts behind each prompt, as many as its longest option has."""
        most = max(len(ids) for prompt in built.prompts for ids in prompt.options)
        task = Requests.of(built.samples, max_new_tokens=most)
        prompts = [dataclasses.replace(prompt, options=[]) for prompt in built.prompts]
        samples = [dataclasses.replace(sample, options=()) for sample in built.samples]
        return [r["output_ids"] for r in self._run(task, PromptSet(task, built.key, samples, prompts), ignore_eos=True)]

    def _prompts(self, task: Requests) -> PromptSet:
        config = self.config
        samples = task.samples()
        prompts = [
            build_prompt(
                sample, self.tokenizer, template="raw", max_prompt_tokens=config.max_prompt_tokens, task="request",
                context_limit=self.context, max_new_tokens=task.max_new_tokens, truncate=config.truncate,
            )
            for sample in samples
        ]  # fmt: skip
        return PromptSet(task, PromptKey(task.name, 0), samples, prompts)

    def _run(
        self, task: Requests, built: PromptSet | None = None, *, ignore_eos: bool = False, temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """A record per prompt, in their order. Raises KvcliError with the message of the first sample that failed."""
        built = built or self._prompts(task)
        if not built.samples:
            return []
        built = built.agnostic() if self.config.query[0] == "agnostic" else built
        cells = self._cells(task, temperature=temperature, top_p=top_p)
        rows, room = self._rows(built)
        plan = make_plan(
            cells,
            [Generation((cells[0].id,), None)],
            {built.key: len(built.samples)},
            min(rows, self.config.prefill_batch),
        )
        options = Options(
            rows, keep_maps=0, ignore_eos=ignore_eos, strict_window=self.config.strict_window, memory=room,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip
        sink = _Records()
        Runner(self.model, plan, {built.key: built}, sink, options).run()
        failed = next((r for r in sink.records if r["status"] != "ok"), None)
        if failed is not None:
            what = f"a request failed under {failed['method']}: {failed['error']}"
            raise KvcliError(what, given="--model kvcli", fix="KVCLI_DEBUG=1 shows where")
        self.measured += [record["measured_ratio"] for record in sink.records]
        by_sample = {record["sample_id"]: record for record in sink.records}
        return [by_sample[sample.id] for sample in built.samples]

    def _cells(self, task: Requests, **drawn: float) -> list[Any]:
        """The one cell. Raises KvcliError where the settings give several or none."""
        config = dataclasses.replace(self.config, **drawn) if drawn else self.config  # type: ignore[arg-type]
        cells = make_cells(config, [task], cell_facts(self.prepared.identity, config))
        if len(cells) != 1:
            what = f"a model has one size: {config.methods[0]} needs a ratio or a budget"
            raise KvcliError(what, given="--model_args", fix=f"method={config.methods[0]},ratio=0.2")
        return cells

    def _rows(self, built: PromptSet) -> tuple[int, int]:
        """Rows of a full cache that decode together, and the bytes they may take."""
        import torch

        itemsize = getattr(torch, self.prepared.dtype).itemsize
        longest = max(len(prompt.ids) for prompt in built.prompts) + built.new_tokens(None)
        kind = self.prepared.device.partition(":")[0]
        memory = parse_memory(self.config.memory) if self.config.memory else DEFAULT_MEMORY.get(kind, 1 << 30)
        rows = rows_that_fit(self.prepared.model_config, itemsize, longest, memory, MAX_DECODE_ROWS)
        return rows, rows * Sizes.of(self.prepared.model_config).kv_elements * itemsize * longest


def _unheard(*_: Any) -> None:
    """lm-eval has its own progress and log."""
