"""From a config to everything a run needs except the weights: tasks, tokenizer, prompts, cells, plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli import sandbox
from kvcli.config import SweepConfig, folder_hash
from kvcli.engine.needs import QUESTION, strange
from kvcli.engine.plan import (
    Cell,
    Generation,
    Plan,
    PromptKey,
    decode_settings,
    is_anchor,
    is_matched,
    make_cells,
    make_plan,
    prompt_keys,
)  # fmt: skip
from kvcli.engine.prompts import NothingBefore, PromptMaker, PromptSet, said_of
from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, text_of
from kvcli.evals.spec import Task
from kvcli.grammar import parse_ratios, ratio_text
from kvcli.kvpress import client as kvpress
from kvcli.methods import catalog
from kvcli.models import loader, profiles
from kvcli.models.source import ModelSource, fingerprint, parse_model
from kvcli.weights import calibration
from kvcli.weights.spec import Weights, canonical, parse_weights, resolve

if TYPE_CHECKING:
    from kvcli.models.prompt import Prompt


DEFAULT_METHODS = ("tier1",)
DEFAULT_RATIOS = ("0.1..0.9:0.2",)


@dataclass(frozen=True)
class Request:
    """A config whose texts were checked and put into canonical form; no torch, no tokenizer yet."""

    config: SweepConfig
    source: ModelSource
    tasks: tuple[Task, ...]
    out: str

    @property
    def weights(self) -> list[Weights]:
        return resolve(self.config.weights, self.config.calib)


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


def check(config: SweepConfig) -> Request:
    """Everything that can be checked without torch. Raises KvcliError."""
    source = parse_model(config.model)
    kvpress.choose(config.kvpress_python)
    methods = [str(m) for m in catalog.expand(config.methods or DEFAULT_METHODS)]
    for method in methods:
        _check_needs(method, source)
    if config.ratios and config.budgets:
        given = f"--ratio {','.join(config.ratios)} --budget {','.join(map(str, config.budgets))}"
        raise KvcliError("--ratio and --budget exclude each other", given=given, fix="keep one of them")
    sized = _check_match(config, methods)
    ratios = (
        () if config.budgets or not sized else tuple(map(ratio_text, parse_ratios(config.ratios or DEFAULT_RATIOS)))
    )
    positive("--limit", config.limit)
    positive("--max-new-tokens", config.max_new_tokens)
    positive("--max-prompt-tokens", config.max_prompt_tokens)
    positive("--max-time", config.max_time)
    if config.keep_maps < 0:
        raise KvcliError("--keep-maps must be at least 0", given=f"--keep-maps {config.keep_maps}", fix="--keep-maps 0")
    positive("--decode-batch", config.decode_batch)
    positive("--prefill-batch", config.prefill_batch)
    for name, values in (("--budget", config.budgets), ("--shots", tuple(s + 1 for s in config.shots))):
        for value in values:
            positive(name, value, shift=1 if name == "--shots" else 0)
    check_model_options(config.dtype, config.template, config.attn, config.threads)
    for mode in config.first_token:
        one_of("--first-token", mode, ("compressed", "prefill"))
    for mode in config.query:
        one_of("--query", mode, ("aware", "agnostic"))
    if config.truncate is not None:
        one_of("--truncate", config.truncate, ("middle", "left"))
    _check_agnostic(config, methods)
    weights = _check_weights(config, source)
    decode_ratios = _check_decoding(config, methods)
    _check_sampling(config)
    tasks = tuple(find_tasks(config.tasks or ((source.suite or "gsm8k"),)))
    sandbox.configure(unsafe=config.unsafe_exec)
    for task in tasks:
        task.check()
    config = dataclasses.replace(
        config, methods=tuple(methods), ratios=ratios, tasks=tuple(map(text_of, tasks)),
        seeds=tuple(dict.fromkeys(config.seeds)), shots=tuple(dict.fromkeys(config.shots)),
        shot_seeds=tuple(dict.fromkeys(config.shot_seeds)), shot_orders=tuple(dict.fromkeys(config.shot_orders)),
        query=tuple(dict.fromkeys(config.query)),
        first_token=tuple(dict.fromkeys(config.first_token)), decode_ratios=decode_ratios,
        decode_budgets=tuple(dict.fromkeys(config.decode_budgets)), weights=weights,
    )  # fmt: skip
    return Request(config, source, tasks, config.out or f"runs/{source.short}-{folder_hash(config)}")


def _check_match(config: SweepConfig, methods: Sequence[str]) -> bool:
    """Whether any method takes a ratio or a budget: with --match none does but anchors that evict before they store.

    Raises KvcliError where there is nothing to match, or nothing that could be matched.
    """
    if config.match is None:
        return True
    one_of("--match", config.match, ("bytes",))
    built = {text: catalog.build(text) for text in methods}
    anchors = [text for text, method in built.items() if is_anchor(method)]
    given = f"--method {','.join(methods)} --match bytes"
    if not anchors:
        known = [n for n in catalog.usable() if is_anchor(catalog.build(n))] or ["./mine.py:MyTransform"]
        what = "there is nothing to match: none of these methods has a size of its own"
        raise KvcliError(what, given=given, fix=f"beside them one of {', '.join(known)}, or without --match")
    if not any(is_matched(method) for method in built.values()):
        what = "nothing can be matched: none of these methods takes any ratio"
        raise KvcliError(what, given=given, fix="beside them methods with a ratio, as tier1")
    sized = any(built[text].domain.kind == "continuous" for text in anchors)
    if not sized and (config.ratios or config.budgets):
        option = f"--ratio {','.join(config.ratios)}" if config.ratios else f"--budget {config.budgets[0]}"
        what = f"--match bytes sets every size to the bytes of {', '.join(anchors)}"
        raise KvcliError(what, given=f"{option} --match bytes", fix=f"without {option.split()[0]}, or without --match")
    return sized


def _check_agnostic(config: SweepConfig, methods: Sequence[str]) -> None:
    """Raises KvcliError for what cannot be done to a part of the prompt that has not seen the question."""
    if "agnostic" not in config.query:
        return
    given = f"--query {','.join(config.query)}"
    if config.decode_ratios != ("off",) or config.decode_budgets or config.cap == "fixed":
        what = "--query agnostic and compression while generating exclude each other: the question would be evicted too"
        raise KvcliError(what, given=given, fix="--query aware, or without --decode-ratio, --decode-budget and --cap")
    blind = {m: sorted(catalog.build(m).needs() & QUESTION) for m in methods}
    for method, names in blind.items():
        if names:
            what = f"{method} reads {' and '.join(names)}, which no method knows before the question"
            raise KvcliError(what, given=f"--method {method} {given}", fix="--query aware for this method")


def _check_weights(config: SweepConfig, source: ModelSource) -> tuple[str, ...]:
    """The canonical texts of the weights axis. Raises KvcliError for other forms and for missing calibration texts."""
    values = parse_weights(config.weights or ("dense",))
    texts = tuple(map(canonical, values))
    if any(values) and config.calib is None and source.kind != "testbed":
        given = f"--model {config.model} --weights {','.join(texts)}"
        what = "pruned weights need texts to be calibrated on"
        raise KvcliError(what, given=given, fix="--calib FILE with texts of the kind the model is used for")
    if config.calib is not None and not any(values):
        what = "--calib changes nothing without pruned weights"
        fix = "--weights dense,sparsegpt:sparsity=0.5 beside it"
        raise KvcliError(what, given=f"--calib {config.calib}", fix=fix)
    resolve(texts, config.calib)
    return texts


def _check_decoding(config: SweepConfig, methods: Sequence[str]) -> tuple[str, ...]:
    """The canonical decode ratios. Raises KvcliError for settings that exclude each other or cannot be met."""
    texts: tuple[str, ...] = ()
    for text in config.decode_ratios:
        try:
            texts += (text,) if text in ("off", "same") else tuple(map(ratio_text, parse_ratios([text])))
        except KvcliError as e:
            fix = "--decode-ratio off, same, or a kept ratio such as 0.5"
            raise KvcliError(e.what, given=f"--decode-ratio {text}", fix=fix) from e
    texts = tuple(dict.fromkeys(texts))
    asked = [f"--decode-ratio {','.join(texts)}"] * (texts != ("off",))
    asked += [f"--decode-budget {','.join(map(str, config.decode_budgets))}"] * bool(config.decode_budgets)
    asked += ["--cap fixed"] * (config.cap == "fixed")
    if len(asked) > 1:
        what = "--decode-ratio, --decode-budget and --cap fixed exclude each other"
        raise KvcliError(what, given=" ".join(asked), fix="keep one of them")
    one_of("--cap", config.cap, ("grow", "fixed"))
    positive("--decode-interval", config.decode_interval)
    for size in config.decode_budgets:
        positive("--decode-budget", size)
    if (config.budgets or config.match) and "same" in texts:
        other = f"--budget {config.budgets[0]}" if config.budgets else f"--match {config.match}"
        given = f"{other} --decode-ratio same"
        raise KvcliError("--decode-ratio same needs --ratio", given=given, fix="--decode-ratio 0.5")
    if not asked and config.decode_interval != 1:
        what = "--decode-interval changes nothing without compression while generating"
        raise KvcliError(what, given=f"--decode-interval {config.decode_interval}", fix="--decode-ratio 0.5 beside it")
    if asked and not any(catalog.build(m).decodes() for m in methods):
        can = [n for n in catalog.usable() if catalog.find(n).decoding]
        what = "none of these methods compresses generated tokens"
        raise KvcliError(what, given=f"--method {','.join(methods)} {asked[0]}", fix=f"--method {','.join(can)}")
    return texts


def _check_sampling(config: SweepConfig) -> None:
    if not 0 <= config.temperature <= 100:
        given = f"--temperature {config.temperature}"
        raise KvcliError("--temperature must lie in 0..100", given=given, fix="--temperature 0.7")
    if not 0 < config.top_p <= 1:
        raise KvcliError("--top-p must lie in (0, 1]", given=f"--top-p {config.top_p}", fix="--top-p 0.95")
    positive("--draws", config.draws)
    if config.temperature == 0 and config.draws > 1:
        given = f"--draws {config.draws}"
        raise KvcliError("without --temperature every draw is the same", given=given, fix="--temperature 0.7")
    if config.temperature == 0 and config.top_p < 1:
        given = f"--top-p {config.top_p}"
        raise KvcliError("--top-p changes nothing without --temperature", given=given, fix="--temperature 0.7")


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


def check_model_options(dtype: str, template: str, attn: str, threads: int | None) -> None:
    """How a model runs and reads. Raises KvcliError for what is not known."""
    one_of("--dtype", dtype, loader.DTYPES)
    one_of("--template", template, ("auto", "chat", "raw"))
    one_of("--attn", attn, ("auto", "flash", "sdpa", "blockwise", "reference"))
    positive("--threads", threads)


def positive(option: str, value: float | None, shift: int = 0) -> None:
    if value is not None and value <= 0:
        given = f"{option} {value - shift}"
        raise KvcliError(
            f"{option} must be at least {1 - shift}", given=given, fix=f"{option} {20 if option == '--limit' else 1}"
        )


def _check_needs(method: str, source: ModelSource) -> None:
    needs = catalog.build(method).needs()
    wrong = strange(needs)
    if wrong:
        fix = "docs/adding-a-method.md lists what needs() may name: column_sum, window:W, reconstruction, ..."
        raise KvcliError(f"unknown statistic '{wrong[0]}'", given=f"--method {method}", fix=fix)
    profiles.check_profiles(source, needs)


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise KvcliError(f"{option} '{value}' is not known", given=f"{option} {value}", fix=" | ".join(choices))


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
