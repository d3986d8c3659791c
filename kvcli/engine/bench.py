"""What `bench` is asked to measure, checked: one process per method and ratio. Runs without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.config import SweepConfig
from kvcli.engine.cells import decode_settings
from kvcli.engine.checking import check
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.models import loader, profiles
from kvcli.models.source import ModelSource, parse_model
from kvcli.results import store

FILE = "bench.jsonl"
PRESETS = {"4096/4096": (4096, 4096), "8192/4096": (8192, 4096)}
"""Prompt and new tokens of the settings in which the benchmark reports efficiency."""
DEFAULT_TOKENS, TESTBED_TOKENS = (4096, 256), (512, 128)
DEFAULT_METHODS, DEFAULT_RATIOS = ("tier1",), ("0.2",)
MAX = "max"
LEAST_PROMPT, LEAST_NEW = 16, 2
"""Room for every region of a prompt; one step for the first token and one that is timed as the others."""


@dataclass(frozen=True)
class Job:
    """What one process measures: one method at one ratio, at each batch size.

    batches: numbers of rows, or 'max'. memory: bytes that the largest batch may take above the loaded model; None: what
    the device has, on a CPU `spare`, half of what was free when the command began.
    """

    model: str
    method: str
    ratio: str | None
    batches: tuple[int | str, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    seed: int = 0
    strict_window: bool = False
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    attn: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = None
    spare: int | None = None
    decode: dict[str, Any] | None = field(default=None, hash=False)
    """How generated tokens are compressed, as in a sweep's cell; None: they are all kept."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "batches": tuple(values["batches"])})

    @property
    def label(self) -> str:
        name = self.method if self.ratio is None or self.method == "full" else f"{self.method} {self.ratio}"
        return name + "".join(f", decode {k} {v}" for k, v in (self.decode or {}).items() if (k, v) != ("interval", 1))


@dataclass(frozen=True)
class Sizes:
    """How much is measured. None: not asked for."""

    preset: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    batch: str = "1"
    repeats: int = 3
    rounds: int = 1
    seed: int = 0
    memory: str | None = None


@dataclass(frozen=True)
class Plan:
    """A checked command: its processes in the order in which they run within each round, `full` first."""

    source: ModelSource
    jobs: tuple[Job, ...]
    rounds: int
    folder: Path
    left_out: Sequence[str] = ()
    """Methods asked for whose work another program does."""

    @property
    def file(self) -> Path:
        return self.folder / FILE

    decode_words: Sequence[str] = ()
    """Options of compression while generating, as `kvcli sweep` takes them."""

    @property
    def measurements(self) -> int:
        return self.rounds * sum(len(job.batches) for job in self.jobs)


def plan(config: SweepConfig, sizes: Sizes) -> Plan:
    """Everything that can be checked without torch. Raises KvcliError.

    config: model, methods, ratios and how the model runs; its other settings have no say here.
    """
    asked = SweepConfig(
        model=config.model, methods=config.methods or DEFAULT_METHODS, ratios=config.ratios or DEFAULT_RATIOS,
        dtype=config.dtype, device=config.device, threads=config.threads, attn=config.attn,
        trust_remote_code=config.trust_remote_code, strict_window=config.strict_window,
        decode_ratios=config.decode_ratios, decode_budgets=config.decode_budgets,
        decode_interval=config.decode_interval, cap=config.cap,
    )  # fmt: skip
    request = check(asked)
    checked, source = request.config, request.source
    prompt_tokens, new_tokens = _tokens(sizes, source)
    for option, value in (("--repeats", sizes.repeats), ("--rounds", sizes.rounds)):
        _at_least(option, value, 1)
    _at_least("--seed", sizes.seed, 0)
    folder = Path(config.out or f"runs/bench-{source.short}")
    store.check_out(folder)
    batches = parse_batches(sizes.batch)
    common = Job(
        model=source.text, method="full", ratio="1", batches=batches,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=sizes.repeats, seed=sizes.seed,
        strict_window=checked.strict_window, dtype=checked.dtype, device=checked.device, threads=checked.threads,
        attn=checked.attn, trust_remote_code=checked.trust_remote_code, memory=_memory(sizes, batches),
        spare=(loader.available_memory() or 0) // 2 or None,
    )  # fmt: skip
    methods, left_out = _measurable(checked.methods)
    jobs = [
        dataclasses.replace(common, method=m, ratio=r, decode=decode)
        for m in methods
        for r in _ratios(m, checked.ratios)
        for decode in decode_settings(checked, catalog.build(m), r)
    ]
    return Plan(source, (common, *jobs), sizes.rounds, folder, left_out, _decode_words(checked))


def _measurable(methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Methods that can be measured, `full` not among them, and those that cannot. Raises KvcliError for none at all."""
    others = [m for m in methods if m != "full"]
    good = [m for m in others if "kvpress" not in catalog.build(m).needs()]
    if others and not good:
        what = "bench does not measure kvpress's classes: they work in a process of their own"
        raise KvcliError(what, given=f"--method {','.join(others)}", fix="kvcli's own methods: kvcli list methods")
    return good, [m for m in others if m not in good]


def _decode_words(config: SweepConfig) -> list[str]:
    words = ["--decode-ratio", ",".join(config.decode_ratios)] if config.decode_ratios != ("off",) else []
    words += ["--decode-budget", ",".join(map(str, config.decode_budgets))] if config.decode_budgets else []
    words += ["--cap", config.cap] if config.cap != "grow" else []
    return words + (["--decode-interval", str(config.decode_interval)] if config.decode_interval != 1 else [])


def _ratios(method: str, ratios: Sequence[str]) -> Sequence[str | None]:
    built = catalog.build(method)
    if built.domain.kind == "continuous":
        return ratios
    return ("1",) if built.domain.points == (1.0,) else (None,)


def _tokens(sizes: Sizes, source: ModelSource) -> tuple[int, int]:
    """Prompt and new tokens: what is typed over the preset over the default."""
    if sizes.preset is not None and sizes.preset not in PRESETS:
        fix = " or ".join(PRESETS)
        raise KvcliError(f"unknown preset '{sizes.preset}'", given=f"--preset {sizes.preset}", fix=fix)
    preset = PRESETS.get(sizes.preset or "", TESTBED_TOKENS if source.kind == "testbed" else DEFAULT_TOKENS)
    prompt_tokens = preset[0] if sizes.prompt_tokens is None else sizes.prompt_tokens
    new_tokens = preset[1] if sizes.new_tokens is None else sizes.new_tokens
    _at_least("--prompt-tokens", prompt_tokens, LEAST_PROMPT)
    _at_least("--new-tokens", new_tokens, LEAST_NEW)
    return prompt_tokens, new_tokens


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise KvcliError(f"{option} must be at least {least}", given=f"{option} {value}", fix=f"{option} {least}")


def parse_batches(text: str) -> tuple[int | str, ...]:
    """'1,4,max' -> (1, 4, 'max'), repeats dropped. Raises KvcliError."""
    found: list[int | str] = []
    for piece in (p.strip() for p in text.split(",")):
        if piece != MAX and not (piece.isdecimal() and int(piece) > 0):
            what = f"'{piece}' is not a batch size"
            raise KvcliError(what, given=f"--batch {text}", fix="--batch 1,4 or --batch max")
        value = MAX if piece == MAX else int(piece)
        if value not in found:
            found.append(value)
    return tuple(found)


def _memory(sizes: Sizes, batches: Sequence[int | str]) -> int | None:
    from kvcli.engine.session import parse_memory

    if sizes.memory is None:
        return None
    if MAX not in batches:
        fix = "--batch max, or leave --memory out"
        raise KvcliError("--memory limits the largest batch", given=f"--memory {sizes.memory}", fix=fix)
    return parse_memory(sizes.memory)


@dataclass(frozen=True)
class Target:
    """The model of a job as it will run, before its weights are read."""

    source: ModelSource
    config: Any
    dtype: str
    device: str


def target(job: Job) -> Target:
    """Reads the model's config (imports transformers) and checks it against the job.

    Raises KvcliError for a model that cannot be found, a device that is not there, and tokens that do not fit.
    """
    source = parse_model(job.model)
    config = loader.load_config(source, trust_remote_code=job.trust_remote_code)
    if source.kind == "random":
        loader.resize(config, source, _vocabulary(source, config))
    device = loader.pick_device(job.device)
    dtype = loader.pick_dtype(job.dtype, device, config)
    loader.check_attention(job.attn, device, dtype)
    profiles.check_profiles(source, catalog.build(job.method).needs(), config)
    _check_context(job, source, getattr(config, "max_position_embeddings", None))
    return Target(source, config, dtype, device)


def _vocabulary(source: ModelSource, config: Any) -> int:
    """What vocab=auto means. Token ids are drawn, not read: a folder without a tokenizer keeps its config's number."""
    if (Path(source.place) / "tokenizer_config.json").exists():
        return len(loader.load_tokenizer(source))
    return int(getattr(config, "vocab_size", 1))


def _check_context(job: Job, source: ModelSource, context: int | None) -> None:
    need = job.prompt_tokens + job.new_tokens
    if context is None or need <= context:
        return
    folder = source.place if source.kind != "hub" else "FOLDER"
    sizes = {**source.settings, "positions": str(need)}
    fix = f"smaller sizes, or --model random:{folder}:" + ",".join(f"{k}={v}" for k, v in sizes.items())
    what = f"{job.prompt_tokens} prompt + {job.new_tokens} new tokens do not fit the context of {context}"
    given = f"--model {job.model} --prompt-tokens {job.prompt_tokens} --new-tokens {job.new_tokens}"
    raise KvcliError(what, given=given, fix=fix)
