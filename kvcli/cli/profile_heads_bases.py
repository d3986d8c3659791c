"""The work of kvcli profile-heads --bases: reads calibration texts, unless the file is there; says what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcli.cli import output
from kvcli.cli.profile_heads_making import make_folder
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.engine.calibrating import Texts
    from kvcli.engine.profiling import Settings
    from kvcli.models.bases import Header
    from kvcli.models.source import ModelSource


def bases(
    source: ModelSource, asked: Settings, calib: str | None, group: int | None, out: Path | None,
    *, force: bool, json: bool,
) -> None:  # fmt: skip
    """Raises KvcliError for everything the user can mend."""
    from kvcli.engine.calibrating import GROUP, Texts
    from kvcli.models.bases import cache_place
    from kvcli.weights.spec import Calibration

    if calib is not None and asked.task is not None:
        given = f"--calib {calib} --task {asked.task}"
        raise KvcliError("bases are made of one kind of texts", given=given, fix="keep one of them")
    texts = Texts(Calibration.of(calib) if calib else None, group or GROUP)
    place = out or cache_place(source)
    _show(source, _make(source, asked, texts, place, force=force), place, json=json)


def _make(source: ModelSource, asked: Settings, texts: Texts, place: Path, *, force: bool) -> Header:
    """What now stands at `place`."""
    from kvcli.engine import calibrating, profiling
    from kvcli.models.bases import existing, read_header, write_bases

    ready = profiling.prepared(source, asked)
    calibrating.check_texts(source, ready, texts)
    have = existing(place, source, calibrating.described(asked, ready, texts), force=force)
    if have is not None and not force:
        output.note(f"{place} was made from these weights with these settings: kept as it is (--force replaces it)")
        return have
    make_folder(place)
    with output.progress("calibrating") as bar:
        header, moments = calibrating.measured(
            source, asked, ready, texts, lambda done, total: bar.update(done, total, model=source.text)
        )
    write_bases(header, moments, place)
    if have is not None:
        output.note(f"{place} is replaced: it held bases {have.digest}")
    return read_header(place)


def _show(source: ModelSource, header: Header, place: Path, *, json: bool) -> None:
    from kvcli.models.bases import cache_place, own_place

    if json:
        output.json_result({**header.to_dict(), "file": str(place)})
    else:
        groups = f"{min(header.group, header.kv_heads)} of {header.kv_heads} KV heads together"
        read = f"{header.texts:,} texts, {header.tokens:,} tokens"
        output.result(f"bases {header.digest}: {header.layers} layers, {groups}, from {read}")
        output.result(str(place))
    own = own_place(source)
    first = own if own is not None and own.is_file() else cache_place(source)  # where methods look first
    named = "calibrated" if place.resolve() == first.resolve() else str(place)
    output.next_command(f"kvcli sweep --model {source.text} --method {_reader()}:basis={named}")


def _reader() -> str:
    """The first method that can read the file."""
    from kvcli.methods.base import setting_fields
    from kvcli.methods.catalog import find, usable

    return next(name for name in usable() if "basis" in {f.name for f in setting_fields(find(name))})
