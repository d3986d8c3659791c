"""The one frozen config of a run: read from the command line or YAML, written to YAML, hashed into ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError, unknown


@dataclass(frozen=True)
class SweepConfig:
    """What was asked for. Tuples are axes of the grid; `docs/cli.md` explains every option.

    Methods, ratios and tasks are canonical texts (kvcli.grammar); an empty `shots` means each task's own number.
    """

    model: str = "testbed"
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    attn: str = "auto"
    trust_remote_code: bool = False
    kvpress_python: str | None = None
    template: str = "auto"
    system: str | None = None
    thinking: bool = False
    truncate: str | None = None

    methods: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    match: str | None = None
    tasks: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    shot_seeds: tuple[int, ...] = (0,)
    shot_orders: tuple[int, ...] = (0,)
    query: tuple[str, ...] = ("aware",)
    first_token: tuple[str, ...] = ("compressed",)
    full: bool = True
    weights: tuple[str, ...] = ("dense",)
    calib: str | None = None
    strict_window: bool = False
    decode_ratios: tuple[str, ...] = ("off",)
    decode_budgets: tuple[int, ...] = ()
    decode_interval: int = 1
    cap: str = "grow"

    temperature: float = 0.0
    top_p: float = 1.0
    draws: int = 1
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    ignore_eos: bool = False
    limit: int | None = None

    data_dir: str | None = None
    out: str | None = None
    keep_maps: int = 5
    store_prompts: bool = False
    prefill_batch: int = 8
    decode_batch: int | None = None
    memory: str | None = None
    max_time: float | None = None
    deterministic: bool = False
    fidelity: bool = True
    unsafe_exec: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], given: str) -> SweepConfig:
        """Raises KvcliError for unknown keys and wrong types; `given` names the source in messages."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        out: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                raise unknown("setting", key, fields, given=given, listing="docs/cli.md")
            out[key] = _typed(key, str(fields[key].type), value, given)
        return cls(**out)

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> SweepConfig:
        return cls.from_dict(read_yaml(path), given=str(path))


GRID = (
    "methods", "ratios", "budgets", "tasks", "shots", "seeds", "first_token", "limit", "full",
    "decode_ratios", "decode_budgets", "decode_interval", "cap", "draws", "weights", "calib", "match",
    "shot_seeds", "shot_orders", "query",
)  # fmt: skip
"""Settings that may grow inside one result folder."""

HOUSEKEEPING = (
    "out",
    "kvpress_python",
    "threads",
    "keep_maps",
    "store_prompts",
    "decode_batch",
    "prefill_batch",
    "memory",
    "max_time",
    "max_prompt_tokens",
    "deterministic",
    "fidelity",
    "unsafe_exec",
)
"""Settings that change no result."""

LATER = ("system", "thinking", "truncate")
"""Settings that folders of earlier versions lack: left out of their names where they are not set."""


def folder_hash(config: SweepConfig) -> str:
    """8 hex digits over all that fixes a result folder: everything but the grid and housekeeping."""
    kept = {k: v for k, v in config.to_dict().items() if k not in GRID + HOUSEKEEPING}
    kept = {k: v for k, v in kept.items() if k not in LATER or v}
    return stable_hash(kept, 8)


def stable_hash(value: Any, digits: int = 12) -> str:
    """Hex digest of a JSON value, independent of key order and of the Python version."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping. Raises KvcliError with file and line when it cannot be read."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise KvcliError(f"cannot read {path}: {e.strerror}", given=str(path), fix="check the path") from e
    except UnicodeDecodeError as e:
        raise KvcliError(f"{path} is not UTF-8 text", given=str(path), fix="save it as UTF-8") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = f"{where} is not YAML: {getattr(e, 'problem', e)}"
        raise KvcliError(what, given=str(path), fix="mend that line") from e
    if not isinstance(values, dict):
        raise KvcliError(f"{path} is not a mapping of settings", given=str(path), fix="write one 'name: value' a line")
    return values


_NAMES = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(key: str, annotation: str, value: Any, given: str) -> Any:
    optional = annotation.endswith("| None")
    kind = annotation.removesuffix("| None").strip()
    if value is None and optional:
        return None
    if kind.startswith("tuple["):
        item = kind[len("tuple[") : -1].split(",")[0]
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(key, item, v, given) for v in values)
    types: dict[str, Any] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    if kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, types[kind]) or (kind != "bool" and isinstance(value, bool)):
        raise KvcliError(
            f"'{key}' must be {_NAMES[kind]}", given=f"{given}: {key}: {value!r}", fix=f"write {_NAMES[kind]}"
        )
    return float(value) if kind == "float" else value
