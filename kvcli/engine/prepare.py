"""From a request to everything a run needs except the weights: tokenizer, prompts, cells, plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.config import SweepConfig
from kvcli.engine.cells import Cell, PromptKey, decode_settings, make_cells, prompt_keys
from kvcli.engine.plan import Generation, Plan, make_plan
from kvcli.engine.prompts import NothingBefore, PromptMaker, PromptSet, said_of
from kvcli.evals.spec import Task
from kvcli.methods import catalog
from kvcli.models import loader, profiles
from kvcli.models.source import fingerprint
from kvcli.weights import calibration
from kvcli.weights.spec import Weights

if TYPE_CHECKING:
    from kvcli.models.prompt import Prompt
from kvcli.engine.checking import Request


@dataclass
class Prepared:
    request: Request
    model_config: Any
    tokenizer: Any
    dtype: str
    device: str
    identity: dict[str, Any]
    cells: list[Cell]
    prompt_sets: dict[PromptKey, PromptSet]
    warnings: list[str]
    calibration: dict[str, list[list[int]]] = field(default_factory=dict)
    """Per pruned weights, as records name them, the texts they are calibrated on."""

    def plan(self, generations: Sequence[Generation], prefill_rows: int) -> Plan:
        available = {key: len(s.samples) for key, s in self.prompt_sets.items()}
        return make_plan(self.cells, generations, available, prefill_rows, self.within)

    def within(self, key: PromptKey, limit: int | None) -> int:
        """Samples of a prompt set among the first `limit` of its task's order."""
        return self.prompt_sets[key].within(limit)


def _without_decode_phase(config: SweepConfig, methods: Sequence[str]) -> str:
    """Names the methods that keep every generated token although compression while generating was asked for."""
    if config.decode_ratios == ("off",) and not config.decode_budgets and config.cap == "grow":
        return ""
    kept = [m for m in methods if m != "full" and decode_settings(config, catalog.build(m), "1") == [None]]
    return f"{', '.join(kept)}: no such compression while generating, every generated token is kept" if kept else ""


def _idle_settings(config: SweepConfig, tasks: Sequence[Task]) -> str:
    """Names the multiple-choice tasks where settings of generated answers change nothing."""
    choosing = [task.name for task in tasks if task.output_type == "multiple_choice"]
    asked = ["--temperature"] * bool(config.temperature) + ["--decode-ratio"] * (config.decode_ratios != ("off",))
    asked += ["--decode-budget"] * bool(config.decode_budgets) + ["--cap"] * (config.cap != "grow")
    if not choosing or not asked:
        return ""
    idle = f"{' and '.join(asked)} change nothing there"
    return f"{', '.join(choosing)}: options are judged, nothing is generated, so {idle}"


MOST_UNKNOWN = 0.2
"""Share of unknown tokens above which a prompt says nothing to its model."""


def _strange_words(task: Task, prompts: Sequence[Prompt], tokenizer: Any) -> str:
    """A warning where the tokenizer does not know the task's words; empty where it does."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not prompts or unknown == tokenizer.eos_token_id:
        return ""
    share = prompts[0].ids.count(unknown) / len(prompts[0].ids)
    if share <= MOST_UNKNOWN:
        return ""
    return f"{share:.0%} of the prompt tokens of {task.name} are unknown to the tokenizer: its scores will mean nothing"


def prepare(request: Request, limit: int | None, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Loads config, tokenizer and data and builds every prompt. limit: samples per task over all generations.

    Raises KvcliError for data that cannot be read and for a prompt that does not fit the model.
    """
    config = request.config
    model_config = loader.load_config(request.source, trust_remote_code=config.trust_remote_code)
    tokenizer = loader.load_tokenizer(request.source, config.tokenizer, trust_remote_code=config.trust_remote_code)
    if request.source.kind == "random":
        loader.resize(model_config, request.source, len(tokenizer))
    device = loader.pick_device(config.device)
    dtype = loader.pick_dtype(config.dtype, device, model_config)
    loader.check_attention(config.attn, device, dtype)
    commit = getattr(model_config, "_commit_hash", None)
    revision = {"revision": commit} if request.source.kind == "hub" and commit else {}
    identity = {**fingerprint(request.source), **revision, "tokenizer": config.tokenizer or "its own", "dtype": dtype}
    for method in config.methods:
        profiles.check_profiles(request.source, catalog.build(method).needs(), model_config)
    facts = cell_facts(identity, config)
    cells = make_cells(config, request.tasks, facts)
    texts = {w.text: _calibration(w, request, tokenizer, model_config) for w in request.weights if w.pruning}
    context = getattr(model_config, "max_position_embeddings", None)
    prompt_sets: dict[PromptKey, PromptSet] = {}
    warnings = list(
        filter(None, [_without_decode_phase(config, config.methods), _idle_settings(config, request.tasks)])
    )

    blind: list[NothingBefore] = []
    maker = PromptMaker(config, tokenizer, context)
    for task in request.tasks:
        for key in prompt_keys(config, task):
            same = prompt_sets.get(key._replace(query="aware"))
            if same is None:
                say(f"reading {task.name}, {key.shots} shot{'s' * (key.shots != 1)}")
                same = maker.prompts(task, key, limit)
                warnings += filter(None, [_strange_words(task, same.prompts, tokenizer), *said_of(same, config.limit)])
                said = task.remarks(shots=key.shots, data_dir=config.data_dir)
                warnings += [text for text in said if text not in warnings]
            try:
                prompt_sets[key] = same if key.query == "aware" else same.agnostic()
            except NothingBefore as error:
                blind.append(error)
                named = f"{task.name}, {key.shots} shot{'s' * (key.shots != 1)}"
                warnings.append(f"{named}: left out of --query agnostic, {error.what.partition(': ')[2]}")
    maker.check()
    if blind and not prompt_sets:
        raise blind[0]
    cells = [cell for cell in cells if cell.prompt_key in prompt_sets]
    return Prepared(request, model_config, tokenizer, dtype, device, identity, cells, prompt_sets, warnings, texts)


def cell_facts(identity: dict[str, Any], config: SweepConfig) -> dict[str, Any]:
    """What the keys of all cells of a folder have in common; pruned weights put theirs in place of the dense ones."""
    given = {
        "system": config.system,
        "thinking": config.thinking or None,
        "truncate": [config.truncate, config.max_prompt_tokens] if config.truncate else None,
    }
    own = {name: value for name, value in given.items() if value is not None}
    return {**identity, "weights": "dense", "template": config.template, **own}


def _calibration(weights: Weights, request: Request, tokenizer: Any, model_config: Any) -> list[list[int]]:
    if weights.pruning is None:
        return []
    context = getattr(model_config, "max_position_embeddings", None)
    testbed = Path(request.source.place) if request.source.kind == "testbed" else None
    return calibration.sequences(weights.pruning, weights.calibration, tokenizer, context, testbed)
