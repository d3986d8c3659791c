"""From a config to a request: every text checked and in canonical form, before torch and the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvcli import sandbox
from kvcli.config import SweepConfig, folder_hash
from kvcli.engine.cells import is_anchor, is_matched
from kvcli.engine.needs import QUESTION, strange
from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, text_of
from kvcli.evals.spec import Task
from kvcli.grammar import parse_ratios, ratio_text
from kvcli.kvpress import client as kvpress
from kvcli.methods import catalog
from kvcli.models import loader, profiles
from kvcli.models.source import ModelSource, parse_model
from kvcli.weights.spec import Weights, canonical, parse_weights, resolve

DEFAULT_METHODS = ("tier1",)
DEFAULT_RATIOS = ("0.1..0.9:0.2",)
FIRST_TOKENS = ("compressed", "prefill")
QUERIES = ("aware", "agnostic")
BOTH = "both"
"""Stands for all modes of an axis of two."""


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


def check(config: SweepConfig) -> Request:
    """Everything that can be checked without torch. Raises KvcliError."""
    config = dataclasses.replace(
        config, first_token=_modes("--first-token", config.first_token, FIRST_TOKENS),
        query=_modes("--query", config.query, QUERIES),
    )  # fmt: skip
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
        decode_ratios=decode_ratios,
        decode_budgets=tuple(dict.fromkeys(config.decode_budgets)), weights=weights,
    )  # fmt: skip
    return Request(config, source, tasks, config.out or f"runs/{source.short}-{folder_hash(config)}")


def _modes(option: str, typed: Sequence[str], known: tuple[str, str]) -> tuple[str, ...]:
    """The modes that were typed, `both` written out, each once. Raises KvcliError for others."""
    for mode in typed:
        one_of(option, mode, (*known, BOTH))
    return tuple(dict.fromkeys(mode for text in typed for mode in (known if text == BOTH else (text,))))


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
