"""The work of kvcli profile-heads: measures or trains, unless the file is there; prints what it holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from kvcli.cli import output
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.engine.gates import Training
    from kvcli.engine.profiling import Ready, Settings
    from kvcli.models.profiles import HeadProfile
    from kvcli.models.source import ModelSource


def make(source: ModelSource, asked: Settings, training: Training | None, place: Path, *, force: bool) -> HeadProfile:
    """What now stands at `place`. training: of gates; None: scores are measured."""
    from kvcli.engine import profiling
    from kvcli.models.profiles import existing, write_gates, write_profile

    ready = profiling.prepared(source, asked)
    have = existing(place, source, _described(asked, ready, training), force=force)
    if have is not None and not force:
        output.note(f"{place} was made from these weights with these settings: kept as it is (--force replaces it)")
        return have
    make_folder(place)
    made = _measured(source, asked, ready) if training is None else _trained(source, asked, ready, training)
    (write_profile if training is None else write_gates)(made, place)
    if have is not None:
        output.note(f"{place} is replaced: it held head profile {have.digest}")
    return made


def make_folder(place: Path) -> None:
    """The folder of a file to be written. Raises KvcliError where it cannot be made."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise KvcliError(f"cannot write {place}: {e.strerror}", given=f"--out {place}", fix="another --out") from e


def _described(asked: Settings, ready: Ready, training: Training | None) -> dict[str, object]:
    from kvcli.engine import profiling

    if training is None:
        return {**profiling.described(asked, ready), "wrong_too": asked.wrong_too}
    from kvcli.engine import gates

    return gates.described(asked, ready, training)


def _measured(source: ModelSource, asked: Settings, ready: Ready) -> HeadProfile:
    from kvcli.engine.profiling import measure

    with output.progress("profiling") as bar:
        return measure(source, asked, lambda done, total: bar.update(done, total, model=source.text), ready)


def _trained(source: ModelSource, asked: Settings, ready: Ready, training: Training) -> HeadProfile:
    from kvcli.engine.gates import trained

    with output.progress("training gates") as bar:
        return trained(
            source, asked, ready, training, lambda done, total, mean: bar.update(done, total, mean=f"mean {mean:.3f}")
        )


def show(source: ModelSource, profile: HeadProfile, place: Path, *, json: bool) -> None:
    """The strongest heads, where the file is, and who reads it."""
    from kvcli.engine.profiling import strongest

    if json:
        output.json_result({**profile.to_dict(), "head_profile": profile.digest, "file": str(place)})
    else:
        headers = ("layer", "head", "score") if profile.per == "query" else ("layer", "KV head", "gate")
        rows = [(layer, head, f"{score:.4f}") for layer, head, score in strongest(profile, 10)]
        output.result(output.table(headers, rows, title=f"head profile {profile.digest}"))
        output.result(str(place))
    method, ratio = (_reader(source, place), "0.2") if profile.per == "query" else _of_gates(source, profile, place)
    output.next_command(f"kvcli sweep --model {source.text} --method {method} --ratio {ratio}")


def _reader(source: ModelSource, place: Path) -> str:
    """The first method that reads a profile, with the file where it is not found without."""
    from kvcli.methods.catalog import build, usable
    from kvcli.models.profiles import cache_place, is_profile, own_place

    method = next(name for name in usable() if any(map(is_profile, build(name).needs())))
    own = own_place(source)
    first = own if own is not None and own.is_file() else cache_place(source)  # where methods look first
    return method if place.resolve() == first.resolve() else f"{method}:profile={place}"


def _of_gates(source: ModelSource, profile: HeadProfile, place: Path) -> tuple[str, str]:
    """DuoAttention with these gates, and a ratio between its least and 1 for prompts like the training's."""
    from kvcli.models.profiles import gates_place

    sinks, recent, tokens = (profile.how[name] for name in ("sinks", "recent", "prompt_tokens"))
    found = place.resolve() == gates_place(source, sinks, recent).resolve()
    heads = "heads=optimise" if found else f"heads=file,profile={place}"
    ratio = math.ceil(5 * (1 + min(1.0, (sinks + recent) / (tokens or sinks + recent)))) / 10
    return f"duo_attention:{heads},sinks={sinks},recent={recent}", f"{ratio:g}"
