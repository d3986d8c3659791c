"""Options that `run` and `sweep` share, and how the sources of settings are layered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli import output, presets
from kvcli.config import SweepConfig, read_yaml
from kvcli.errors import KvcliError
from kvcli.grammar import NotASetting, split_tasks

ENVIRONMENT = "KVCLI_"
_GRID, _ANSWERS, _MODEL, _RUNNING = "Grid", "While generating", "Model", "Running"


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:
    help = help.replace("[", "\\[")  # brackets are markup to typer
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


Model = Annotated[
    str | None,
    _option(
        "--model",
        "-m",
        help="testbed, an alias, ORG/NAME[@REV], ./FOLDER or random:FOLDER:layers=2,... [default: testbed]",
        panel=_MODEL,
        metavar="MODEL",
    ),
]
Tokenizer = Annotated[
    str | None, _option("--tokenizer", help="Folder or hub id of another tokenizer.", panel=_MODEL, metavar="FOLDER|ID")
]
Dtype = Annotated[
    str | None, _option("--dtype", help="auto, float16, bfloat16, float32 or float64.", panel=_MODEL, metavar="DTYPE")
]
Device = Annotated[str | None, _option("--device", help="auto, cpu, cuda or cuda:N.", panel=_MODEL, metavar="DEVICE")]
Threads = Annotated[
    int | None,
    _option(
        "--threads",
        help="CPU threads [default: one for small models, else torch's choice].",
        panel=_RUNNING,
        metavar="N",
    ),
]
Attn = Annotated[
    str | None, _option("--attn", help="auto, flash, sdpa, blockwise or reference.", panel=_MODEL, metavar="BACKEND")
]
TrustRemoteCode = Annotated[
    bool | None, _option("--trust-remote-code", help="Run model code from the hub.", panel=_MODEL)
]
KvpressPython = Annotated[
    str | None,
    _option(
        "--kvpress-python",
        help="Python of an environment with kvpress, for --method kvpress:CLASS.",
        panel=_MODEL,
        metavar="PATH",
    ),
]
Template = Annotated[
    str | None, _option("--template", help="auto, chat or raw prompts.", panel=_MODEL, metavar="WHICH")
]
System = Annotated[
    str | None,
    _option("--system", help="A system text in front of every prompt; @FILE reads it.", panel=_MODEL, metavar="TEXT"),
]
Thinking = Annotated[
    bool | None,
    _option("--thinking/--no-thinking", help="For templates that ask: the model may think first.", panel=_MODEL),
]
Methods = Annotated[
    list[str] | None,
    _option(
        "--method",
        "-M",
        help="Methods with settings: snapkv:window=16,h2o; tier1; ./mine.py:MyMethod.",
        panel=_GRID,
        metavar="METHODS",
    ),
]
Ratios = Annotated[
    list[str] | None,
    _option("--ratio", "-r", help="Kept ratios: 0.1,0.5 or 0.1..0.9:0.2.", panel=_GRID, metavar="RATIOS"),
]
Budgets = Annotated[
    str | None,
    _option("--budget", help="KV pairs kept per layer and head, instead of --ratio.", panel=_GRID, metavar="N,N"),
]
Match = Annotated[
    str | None,
    _option(
        "--match",
        help="bytes: methods with a ratio keep, of each prompt, the bytes of each method that has its own size.",
        panel=_GRID,
        metavar="WHAT",
    ),
]
Tasks = Annotated[
    list[str] | None, _option("--task", "-t", help="Tasks, suites, globs or ./file.yaml.", panel=_GRID, metavar="TASKS")
]
Shots = Annotated[
    str | None,
    _option("--shots", help="Numbers of examples in the prompt [default: the task's own].", panel=_GRID, metavar="N,N"),
]
Seeds = Annotated[
    str | None, _option("--seed", help="Seeds of random methods and of sampled answers.", panel=_GRID, metavar="N,N")
]
ShotSeeds = Annotated[
    str | None, _option("--shot-seed", help="Which examples are drawn [default: 0].", panel=_GRID, metavar="N,N")
]
ShotOrders = Annotated[
    str | None,
    _option("--shot-order", help="Their order: 0 as they come, N shuffled [default: 0].", panel=_GRID, metavar="N,N"),
]
Query = Annotated[
    str | None,
    _option(
        "--query",
        help="aware: the question is compressed with the rest; agnostic: the rest without it; both [default: aware].",
        panel=_GRID,
        metavar="MODES",
    ),
]
FirstToken = Annotated[
    str | None,
    _option(
        "--first-token",
        help="compressed, prefill or both.",
        panel=_GRID,
        metavar="MODES",
    ),
]
NoFull = Annotated[
    bool | None, _option("--full/--no-full", help="Add the full cache as baseline [default: yes].", panel=_GRID)
]
Weights = Annotated[
    list[str] | None,
    _option(
        "--weights",
        help="Weights: dense, pruned ones as sparsegpt:sparsity=0.5 or sparsegpt:2:4, or a list [default: dense].",
        panel=_GRID,
        metavar="WEIGHTS",
    ),
]
Calib = Annotated[
    str | None,
    _option(
        "--calib",
        help="Texts that pruned weights are calibrated on: .txt a running text, else one per line.",
        panel=_GRID,
        metavar="FILE",
    ),
]
StrictWindow = Annotated[
    bool | None, _option("--strict-window", help="Keep the paper's window even above the budget.", panel=_GRID)
]
Limit = Annotated[
    int | None,
    _option("--limit", "-n", help="First N samples of each task's fixed permutation.", panel=_GRID, metavar="N"),
]
DecodeRatio = Annotated[
    str | None,
    _option(
        "--decode-ratio",
        help="Kept ratio of generated tokens: off, same (as --ratio) or R; a list [default: off].",
        panel=_ANSWERS,
        metavar="R,R",
    ),
]
DecodeBudget = Annotated[
    str | None,
    _option("--decode-budget", help="Generated tokens kept, instead of --decode-ratio.", panel=_ANSWERS, metavar="N,N"),
]
DecodeInterval = Annotated[
    int | None,
    _option(
        "--decode-interval", help="Compress after every K generated tokens [default: 1].", panel=_ANSWERS, metavar="K"
    ),
]
Cap = Annotated[
    str | None,
    _option(
        "--cap",
        help="grow, or fixed: the cache never exceeds the prompt's budget [default: grow].",
        panel=_ANSWERS,
        metavar="WHICH",
    ),
]
Temperature = Annotated[
    float | None,
    _option(
        "--temperature", help="Sample answers; 0 takes the likeliest token [default: 0].", panel=_ANSWERS, metavar="T"
    ),
]
TopP = Annotated[
    float | None,
    _option("--top-p", help="Sample from the likeliest tokens of this mass [default: 1].", panel=_ANSWERS, metavar="P"),
]
Draws = Annotated[
    int | None, _option("--draws", help="Sampled answers per prompt [default: 1].", panel=_ANSWERS, metavar="K")
]
MaxNewTokens = Annotated[
    int | None,
    _option("--max-new-tokens", help="Length of answers [default: the task's own].", panel=_ANSWERS, metavar="N"),
]
MaxPromptTokens = Annotated[
    int | None,
    _option(
        "--max-prompt-tokens",
        help="Leave longer prompts out, or cut them with --truncate.",
        panel=_RUNNING,
        metavar="N",
    ),
]
Truncate = Annotated[
    str | None,
    _option(
        "--truncate",
        help="Cut prompts that are too long: middle, or left; never the question.",
        panel=_RUNNING,
        metavar="WHERE",
    ),
]
UnsafeExec = Annotated[
    bool | None,
    _option(
        "--unsafe-exec",
        help="Run generated programs with plain limits where no sandbox can be had.",
        panel=_RUNNING,
    ),
]
IgnoreEos = Annotated[bool | None, _option("--ignore-eos", help="Always generate the full length.", panel=_ANSWERS)]
Deterministic = Annotated[
    bool | None,
    _option(
        "--deterministic",
        help="Rows stay together to the end: slower; a repeated run is the same bit for bit.",
        panel=_RUNNING,
    ),
]
Fidelity = Annotated[
    bool | None,
    _option(
        "--fidelity/--no-fidelity",
        help="Compare predictions on full's own answer (KL, top-1, NLL) [default: yes].",
        panel=_RUNNING,
    ),
]
DataDir = Annotated[
    str | None,
    _option(
        "--data-dir",
        help="Folder with one sub-folder of SPLIT.jsonl per data set, instead of the hub.",
        panel=_RUNNING,
        metavar="FOLDER",
    ),
]
Out = Annotated[
    str | None,
    _option("--out", "-o", help="Result folder; the same command resumes it.", panel=_RUNNING, metavar="FOLDER"),
]
KeepMaps = Annotated[
    int | None,
    _option(
        "--keep-maps",
        help="Samples per task whose kept positions are stored [default: 5].",
        panel=_RUNNING,
        metavar="N",
    ),
]
StorePrompts = Annotated[
    bool | None, _option("--store-prompts", help="Store the text of harmful prompts too.", panel=_RUNNING)
]
PrefillBatch = Annotated[
    int | None, _option("--prefill-batch", help="Samples prefilled together [default: 8].", panel=_RUNNING, metavar="N")
]
DecodeBatch = Annotated[
    int | None,
    _option(
        "--decode-batch",
        help="Rows of full length decoded together [default: from --memory].",
        panel=_RUNNING,
        metavar="N",
    ),
]
Memory = Annotated[
    str | None,
    _option("--memory", help="Memory for the caches of one decode batch, as in 8G.", panel=_RUNNING, metavar="SIZE"),
]
MaxTime = Annotated[
    float | None,
    _option("--max-time", help="Stop cleanly after this many seconds (exit 75).", panel=_RUNNING, metavar="S"),
]
Preset = Annotated[str | None, _option("--preset", help="A shipped YAML of settings.", panel=_RUNNING, metavar="NAME")]
ConfigFile = Annotated[
    Path | None,
    _option("--config", "-c", help="YAML of settings; the command line wins.", panel=_RUNNING, metavar="FILE"),
]
Json = Annotated[bool, _option("--json", help="Print one JSON document.", panel=_RUNNING)]
DryRun = Annotated[bool, _option("--dry-run", help="Print what would run; load no weights.", panel=_RUNNING)]


def integers(option: str, text: str | None, least: int = 0) -> tuple[int, ...] | None:
    """'0,1' -> (0, 1). least: for the example in an error alone. Raises KvcliError."""
    if text is None:
        return None
    example = "0,1" if least == 0 else "64,128"
    try:
        values = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        fix = f"{option} {_rounded(text, least) or example}"
        what = f"'{text}' is not a list of whole numbers"
        raise KvcliError(what, given=f"{option} {text}", fix=fix) from None
    if any(v < 0 for v in values):
        raise KvcliError(f"{option} takes no negative numbers", given=f"{option} {text}", fix=f"{option} {example}")
    return values


def _least(name: str) -> int:
    """Of a setting's numbers: sizes begin with 1, seeds and shots with 0."""
    return 1 if name.endswith("budgets") else 0


def _rounded(text: str, least: int) -> str:
    """The list with numbers such as 64.5 and 1e3 made whole; empty where a piece is no number or too small."""
    try:
        whole = [int(float(piece)) for piece in text.split(",")]
    except (ValueError, OverflowError):
        return ""
    return ",".join(map(str, whole)) if min(whole) >= least else ""


def collect(typed: dict[str, Any]) -> dict[str, Any]:
    """The options a user typed (None: not typed), under the names and in the types of SweepConfig."""
    typed = dict(typed)
    lists = {"methods": typed.pop("method"), "ratios": typed.pop("ratio"), "tasks": typed.pop("task")}
    named: dict[str, Any] = {name: (v,) if isinstance(v, str) else v for name, v in lists.items()}
    if named["tasks"]:
        try:
            named["tasks"] = tuple(split_tasks(named["tasks"]))
        except NotASetting:
            from kvcli.evals.loader import find_tasks

            find_tasks(named["tasks"])  # it knows the tasks, and what was probably meant
            raise
    for name, option in (
        ("budgets", "budget"),
        ("seeds", "seed"),
        ("shots", "shots"),
        ("decode_budgets", "decode_budget"),
        ("shot_seeds", "shot_seed"),
        ("shot_orders", "shot_order"),
    ):
        named[name] = integers(f"--{option.replace('_', '-')}", typed.pop(option), _least(name))
    named["first_token"] = words(typed.pop("first_token"))
    named["query"] = words(typed.pop("query"))
    named["system"] = _text(typed.pop("system"))
    named["decode_ratios"] = words(typed.pop("decode_ratio"))
    return {key: value for key, value in {**named, **typed}.items() if value is not None and value != []}


def _text(given: str | None) -> str | None:
    """The text itself, or that of the file behind @. Raises KvcliError."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise KvcliError(f"cannot read {given[1:]}: {why}", given=f"--system {given}", fix="check the path") from e


def words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(piece.strip() for piece in text.split(","))


def layered(passed: dict[str, Any], preset: str | None, file: Path | None) -> SweepConfig:
    """Command line over file over preset over KVCLI_* variables over defaults."""
    values: dict[str, Any] = {}
    sources = [(_environment(), "KVCLI_* variables"), (_preset(preset), f"--preset {preset}")]
    sources += [(read_yaml(file), str(file))] if file is not None else []
    for source, given in [*sources, (passed, "the command line")]:
        for name, other in (("ratios", "budgets"), ("budgets", "ratios"), ("decode_ratios", "decode_budgets"),
                            ("decode_budgets", "decode_ratios")):  # fmt: skip
            if name in source and other not in source:
                values.pop(other, None)  # the later source replaces the earlier one's way of saying it
        values.update(_checked(source, given))
    return SweepConfig.from_dict(values, "settings")


def _checked(values: dict[str, Any], given: str) -> dict[str, Any]:
    """The values of one source, wrong ones refused in its name."""
    config = SweepConfig.from_dict(values, given).to_dict()
    return {key: config[key] for key in values}


def _environment() -> dict[str, Any]:
    """KVCLI_DATA_DIR=..., KVCLI_SEEDS=0,1; an empty variable counts as unset."""
    names = {f"{ENVIRONMENT}{name.upper()}": field for name, field in SweepConfig.__dataclass_fields__.items()}
    found = {names[key].name: (names[key], value) for key, value in os.environ.items() if key in names and value}
    return {name: _from_text(str(field.type), name, value) for name, (field, value) in found.items()}


def _from_text(annotation: str, name: str, value: str) -> Any:
    """A variable's text in the type of its setting. Texts of the grammar (methods, ratios, tasks) stay whole."""
    given, kind = f"{ENVIRONMENT}{name.upper()}={value}", annotation.removesuffix("| None").strip()
    if kind == "tuple[int, ...]":
        return integers(f"{ENVIRONMENT}{name.upper()}", value, _least(name.lower()))
    if kind == "tuple[str, ...]":
        return (
            [value]
            if name in ("methods", "ratios", "weights", "tasks")
            else [piece.strip() for piece in value.split(",")]
        )
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise KvcliError(f"'{name}' must be true or false", given=given, fix=f"{ENVIRONMENT}{name.upper()}=true")
        return value.lower() == "true"
    try:
        return {"int": int, "float": float, "str": str}[kind](value)
    except ValueError:
        raise KvcliError(f"'{name}' must be a number", given=given, fix=f"{ENVIRONMENT}{name.upper()}=1") from None


def _preset(name: str | None) -> dict[str, Any]:
    """A preset's settings; its note, what its results cannot be, is said before they are used."""
    if name is None:
        return {}
    values, note = presets.read(name)
    if note:
        output.note(note)
    return values
