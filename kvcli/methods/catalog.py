"""Finds methods: one file per method in this package, entry points `kvcli.methods`, or PATH.py:CLASS."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kvcli.errors import KvcliError, unknown
from kvcli.grammar import MethodText, NotASetting, Part, parse_methods, parse_ratios, ratio_text
from kvcli.kvpress.presses import PREFIX, VERSION
from kvcli.methods._kvpress import Kvpress, build_press
from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import Merge, Method, Wrapper, setting_fields
from kvcli.methods.composed import Composed

_NOT_METHODS = {"__init__", "base", "catalog", "composed", "context", "generating"}


@cache
def names() -> tuple[str, ...]:
    """All methods known by name: files of this package (without a leading underscore) and entry points."""
    return tuple(sorted({*_files(), *_entry_points()}))


def own_names() -> tuple[str, ...]:
    """The methods that come with kvcli."""
    return tuple(sorted(_files()))


def _files() -> set[str]:
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return {stem for stem in stems if not stem.startswith("_")} - _NOT_METHODS


@cache
def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="kvcli.methods")}


def _is_method(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value)


def find(source: str) -> type[Method]:
    """The class behind a name, an entry point or PATH.py:CLASS. Raises KvcliError when there is none."""
    if source.startswith(PREFIX):
        return Kvpress
    return _from_file(source) if ".py:" in source else _by_name(source)


@cache
def _by_name(source: str) -> type[Method]:
    if source in _files():
        module = importlib.import_module(f"kvcli.methods.{source}")
        found = [v for v in vars(module).values() if _is_method(v) and v.name == source]
        if len(found) != 1:
            raise TypeError(f"kvcli/methods/{source}.py must define exactly one method named {source!r}")
        return found[0]
    if source in _entry_points():
        return _checked(_loaded(source), source)
    raise unknown("method", source, names(), given=f"--method {source}", listing="kvcli list methods")


def _loaded(source: str) -> Any:
    point = _entry_points()[source]
    try:
        return point.load()
    except Exception as e:
        what = f"the package of method '{source}' cannot be imported: {type(e).__name__}: {e}"
        raise KvcliError(what, given=f"--method {source}", fix=f"mend or uninstall {point.value}") from e


def _installed(source: str) -> str | None:
    """Hash of the package behind an installed method: its version and its files; None for methods of kvcli itself."""
    point = None if source in _files() else _entry_points().get(source)
    if point is None:
        return None
    _by_name(source)  # a package that cannot be imported is named, not hashed
    spec = importlib.util.find_spec(point.module)
    version = point.dist.version if point.dist else ""
    files = [Path(spec.origin)] if spec and spec.origin else []
    if spec and spec.submodule_search_locations:
        files = sorted(files[0].parent.rglob("*.py")) if files else []
    return hashlib.sha256("\0".join([version, *map(_digest, files)]).encode()).hexdigest()[:12]


def _from_file(source: str) -> type[Method]:
    """The class as the file has it now: an edited file is read again."""
    path_text, _, _ = source.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        fix = "check the path; it is read from the current folder"
        raise KvcliError(f"no file {path_text}", given=f"--method {source}", fix=fix)
    return _from_version(source, _digest(path))


@cache
def _from_version(source: str, digest: str) -> type[Method]:
    path_text, _, class_name = source.rpartition(":")
    path, given = Path(path_text).expanduser(), f"--method {source}"
    spec = importlib.util.spec_from_file_location(f"kvcli_plugin_{digest}", path)
    if spec is None or spec.loader is None:
        raise KvcliError(f"{path_text} is not a Python file", given=given, fix="PATH.py:CLASS")
    module = ModuleType(spec.name)
    module.__file__ = str(path)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise KvcliError(
            f"{path_text} cannot be imported: {type(e).__name__}: {e}", given=given, fix="mend the file"
        ) from e
    classes = sorted(name for name, v in vars(module).items() if _is_method(v) and v.__module__ == module.__name__)
    if class_name not in classes:
        fix = f"{path_text}:{classes[0]}" if classes else "derive a class from kvcli.methods.base.Method"
        raise KvcliError(f"no method class '{class_name}' in {path_text}", given=given, fix=fix)
    return _checked(getattr(module, class_name), source)


def _checked(cls: Any, source: str) -> type[Method]:
    if not _is_method(cls) or not dataclasses.is_dataclass(cls):
        fix = "a frozen dataclass derived from kvcli.methods.base.Method, with select()"
        raise KvcliError(f"{source} is not a method", given=f"--method {source}", fix=fix)
    return cls  # type: ignore[return-value]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def code_hash(method: MethodText) -> str | None:
    """Hash of the code behind parts and bases that do not come with kvcli, so that an edited plugin is a new cell; None
    where all do."""
    sources = [s for p in method.parts for s in (p.source, *(v for k, v in p.settings if k == "base"))]
    files = [Path(s.rpartition(":")[0]).expanduser() for s in sources if ".py:" in s]
    presses = [f"kvpress {VERSION}" for p in method.parts if p.source.startswith(PREFIX)]
    packages = [found for s in sources if (found := _installed(s))]
    return "-".join([*map(_digest, files), *packages, *presses]) or None


def expand(texts: Iterable[str]) -> list[MethodText]:
    """Parsed --method options with the groups `all` and `tierN` written out, settings checked, in canonical form."""
    out: list[MethodText] = []
    for method in _parsed(texts):
        for one in _group(method):
            text = canonical(one)
            if isinstance(build(text), Merge):
                what = f"{text} folds what an evictor drops, and there is none before it"
                raise KvcliError(what, given=f"--method {text}", fix=f"snapkv+{text}")
            if text not in out:
                out.append(text)
    return out


def _parsed(texts: Iterable[str]) -> list[MethodText]:
    try:
        return parse_methods(texts)
    except NotASetting as fault:
        raise _meant(fault) from None


def _meant(fault: NotASetting) -> KvcliError:
    """The same error with the spelling that was probably meant: `snapkv:0.3` is a ratio, `quant:int4` a dtype."""
    name, _, value = fault.text.partition("=")
    source, text = (fault.source, fault.text) if fault.source else (name.strip(), value.strip())
    plain = source.replace("-", "_")
    if plain not in names():  # a group, a press, a file of the user's
        if fault.source and not re.search(r"\W|^all$|^tier", plain):
            find(plain)
        return fault
    typed = f"{source}:{text}" if fault.source else fault.text
    cls = find(plain)
    ratio, setting = _ratio(text), _likely(cls, text)
    if ratio and cls.domain.kind == "continuous":
        fix = fault.given.replace(typed, source, 1) + f" --ratio {ratio}"
    else:
        fix = fault.given.replace(typed, f"{source}:{setting}" if setting and not ratio else source, 1)
        fix += ", it takes no ratio" if ratio else ""
        fix += f" (settings of {source}: {', '.join(f.name for f in setting_fields(cls)) or 'none'})"
    return KvcliError(f"'{text}' is not a setting of {source}", given=fault.given, fix=fix)


def _ratio(text: str) -> str | None:
    """The kept ratio that a text such as 0.3 or 30% stands for."""
    share = text.removesuffix("%")
    try:
        ratio = parse_ratios([share if share == text else f"{share}e-2"])[0]
    except KvcliError:
        return None
    return ratio_text(ratio) if ratio < 1 else None


def _likely(cls: type[Method], text: str) -> str:
    """KEY=VALUE that a value without its key, or with another sign between them, stands for; else a setting's default;
    empty for a method without settings."""
    fields = setting_fields(cls)
    key, _, value = (part.strip() for part in re.sub(r"[\s:]+", "=", text.strip(), count=1).partition("="))
    for field in fields:
        if field.name == key:
            return f"{key}={value or _text(field.default)}"
    for field in fields:
        choice = next((str(c) for c in field.metadata.get("choices") or () if str(c).endswith(text)), None)
        if choice:
            return f"{field.name}={choice}"
        if issubclass(cls, Wrapper) and field.name == "base" and text in _bases():
            return f"base={text}"
    if text.isdecimal():
        whole = next((f.name for f in fields if type(f.default) is int and not f.metadata.get("choices")), None)
        if whole:
            return f"{whole}={text}"
    return f"{fields[0].name}={_text(fields[0].default)}" if fields else ""


def _group(method: MethodText) -> list[MethodText]:
    part = method.parts[0]
    tier = part.source.removeprefix("tier")
    if part.source != "all" and not (part.source.startswith("tier") and tier.isdigit()):
        return [method]
    if part.settings or len(method.parts) > 1:
        fix = f"name the methods one by one, or --method {part.source}"
        raise KvcliError(f"'{part.source}' takes no settings and no '+'", given=f"--method {method}", fix=fix)
    members = [n for n in usable() if part.source == "all" or find(n).tier == int(tier)]
    if not members:
        tiers = sorted({find(n).tier for n in usable()})
        fix = " or ".join(f"tier{t}" for t in tiers if t) + ", or all"
        raise KvcliError(f"no method is in '{part.source}'", given=f"--method {method}", fix=fix)
    return [MethodText((Part(n),)) for n in members if n != "full" and not issubclass(find(n), Merge)]


def build(text: str | MethodText) -> Method:
    """The method with its settings; parts joined by '+' become one.

    Raises KvcliError for unknown settings, values outside their range and parts that do not go together.
    """
    method = _parsed([text])[0] if isinstance(text, str) else text
    parts = [_build(part) for part in method.parts]
    return parts[0] if len(parts) == 1 else Composed.of(parts, str(method))


def _build(part: Part) -> Method:
    """One part; settings `base.KEY` belong to a wrapper's base."""
    if part.source.startswith(PREFIX):
        return build_press(part)
    cls = find(part.source)
    own = tuple((k, v) for k, v in part.settings if "." not in k)
    dotted = tuple((k, v) for k, v in part.settings if "." in k)
    values = _values(cls, Part(part.source, own))
    if not issubclass(cls, Wrapper):
        if dotted:
            fix = "base.KEY=VALUE is for methods with a base, as in adakv:base.window=16"
            raise KvcliError(f"{part.source} has no base", given=f"--method {part}", fix=fix)
        return cls(**values)
    base = _base_of(cls, part)
    if ".py:" not in base and not base.startswith(PREFIX) and base not in names():
        close = get_close_matches(base, _bases(), n=1, cutoff=0.5)
        fix = f"base={' | '.join([*close, *(name for name in _bases() if name not in close)])}"
        raise KvcliError(f"unknown base '{base}'", given=f"--method {part}", fix=fix)
    strange = [k for k, _ in dotted if not k.startswith("base.")]
    if strange:
        fix = f"base.{strange[0].partition('.')[2]}=..."
        raise KvcliError(f"'{strange[0]}' is no setting of {part.source}", given=f"--method {part}", fix=fix)
    inner = _build(Part(base, tuple((k.removeprefix("base."), v) for k, v in dotted)))
    if not isinstance(inner, RankedMethod) or isinstance(inner, Wrapper):
        fix = f"base={' | '.join(_bases())}"
        raise KvcliError(f"'{base}' does not rank keys per head", given=f"--method {part}", fix=fix)
    return cls(**values, inner=inner)


def _bases() -> list[str]:
    return [name for name in usable() if issubclass(find(name), RankedMethod) and not issubclass(find(name), Wrapper)]


def _base_of(cls: type[Method], part: Part) -> str:
    base: str = dict(part.settings).get("base") or _default(cls, "base")
    return base


def _default(cls: type[Method], name: str) -> Any:
    return next(f.default for f in setting_fields(cls) if f.name == name)


def _values(cls: type[Method], part: Part) -> dict[str, Any]:
    """The settings typed for a part, checked."""
    fields = {f.name: f for f in setting_fields(cls)}
    values = {}
    for key, value in part.settings:
        if key not in fields:
            given = f"--method {part}"
            if not fields:
                raise KvcliError(f"{part.source} has no settings", given=given, fix=f"--method {part.source}")
            if issubclass(cls, Wrapper) and any(f.name == key for f in setting_fields(find(_base_of(cls, part)))):
                fix = f"{part.source}:base.{key}={value}"
                raise KvcliError(f"'{key}' is a setting of its base, not of {part.source}", given=given, fix=fix)
            raise unknown(f"setting of {part.source}", key, fields, given=given, listing="kvcli list methods --json")
        joined = re.match(r"([^:]*):(\w+)=", value)
        if joined and joined[2] in fields:
            fix = f"{part.source}:{key}={value.replace(':', ',', 1)}"
            raise KvcliError("settings are joined by commas", given=f"--method {part}", fix=fix)
        values[key] = _value(fields[key], value, part)
    return values


def canonical(method: MethodText) -> MethodText:
    """The one spelling: settings sorted, defaults dropped."""
    build(method)
    return MethodText(tuple(Part(part.source, tuple(sorted(_changed(_build(part)).items()))) for part in method.parts))


def _changed(method: Method) -> dict[str, str]:
    """Settings that are not defaults, as text."""
    if isinstance(method, Kvpress):
        return method.changed()
    fields = setting_fields(type(method))
    changed = {f.name: _text(getattr(method, f.name)) for f in fields if getattr(method, f.name) != f.default}
    if isinstance(method, Wrapper):
        changed.update({f"base.{k}": v for k, v in _changed(method.inner).items()})
    return changed


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(field: dataclasses.Field[Any], text: str, part: Part) -> Any:
    given = f"--method {part}"
    usual = f"{part.source}:{field.name}={_text(field.default)}"
    kind: type = type(field.default)
    try:
        if kind is bool:
            value: Any = {"true": True, "false": False}[text.lower()]
        else:
            value = kind(text)
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise KvcliError(f"'{field.name}={text}' must be {words}", given=given, fix=usual) from None
    if field.metadata.get("odd") and value % 2 == 0:
        raise KvcliError(f"'{field.name}={text}' must be odd", given=given, fix=usual)
    low, high, choices = (field.metadata.get(k) for k in ("ge", "le", "choices"))
    if choices and value not in choices:
        fix = f"{part.source}:{field.name}={' | '.join(map(str, choices))}"
        raise KvcliError(f"'{field.name}={text}' is not one of its values", given=given, fix=fix)
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        limits = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise KvcliError(f"'{field.name}={text}' is out of range: {limits}", given=given, fix=usual)
    return value


def cards() -> list[dict[str, Any]]:
    """The declared facts of all named methods, benchmark's own first."""
    return sorted(map(_card, usable()), key=lambda c: (c["tier"], c["name"]))


def _card(name: str) -> dict[str, Any]:
    """What a method declares, and what it reads with its defaults."""
    return {**find(name).card(), "needs": sorted(_build(Part(name)).needs())}


def usable() -> list[str]:
    """All names whose code can be imported: one broken package leaves the others usable."""
    good = []
    for name in names():
        with contextlib.suppress(KvcliError):
            find(name)
            good.append(name)
    return good
