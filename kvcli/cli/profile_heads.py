"""kvcli profile-heads: how much each attention head of a model retrieves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcli.cli import options, output
from kvcli.errors import KvcliError


def command(
    model: options.Model = None,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="A task with a passage and an answer that stands in it.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Prompts.")] = 64,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=64, help="Length of made prompts.", show_default=False)
    ] = None,
    wrong_too: Annotated[bool, typer.Option("--wrong-too", help="Count prompts that are answered wrong.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write \\[default: in the user's cache].", show_default=False),
    ] = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    attn: options.Attn = None,
    template: options.Template = None,
    trust_remote_code: options.TrustRemoteCode = None,
    data_dir: options.DataDir = None,
    json: options.Json = False,
) -> None:
    """Measure how much each attention head retrieves.

    The model answers from a passage; a head's score is its attention to the answer's tokens there. Methods that give
    heads different budgets read it. Without --task, prompts are made: needles in the testbed's language for models that
    know its words, pass keys between plain sentences for all others. The file is found again by the model's weights;
    --out MODEL/head_profile.json puts it into the model's own folder.

    \b
    Examples:
      kvcli profile-heads
      kvcli profile-heads --model ./my-testbed/model --out my-testbed/model/head_profile.json
      kvcli profile-heads --model qwen2.5-0.5b-instruct --limit 100 --prompt-tokens 4000
    """
    from kvcli.cli.running import quiet_libraries
    from kvcli.engine.prepare import check_model_options
    from kvcli.models.source import parse_model

    source = parse_model(model or "testbed")
    if out is not None and out.is_dir():
        raise KvcliError(f"{out} is a folder", given=f"--out {out}", fix=f"--out {out / 'head_profile.json'}")
    check_model_options(dtype or "auto", template or "auto", attn or "auto", threads)
    quiet_libraries()
    from kvcli.engine.profiling import Settings, measure, strongest
    from kvcli.models.profiles import cache_place, own_place, read_profile, write_profile

    place = out or cache_place(source)
    if place.exists():
        read_profile(place)  # refuses, before the model is run, what it could not overwrite
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise KvcliError(f"cannot write {place}: {e.strerror}", given=f"--out {place}", fix="another --out") from e
    asked = Settings(
        task, limit, prompt_tokens, wrong_too, tokenizer, dtype or "auto", device or "auto", attn or "auto", threads,
        template or "auto", bool(trust_remote_code), data_dir,
    )  # fmt: skip
    with output.progress("profiling") as bar:
        profile = measure(source, asked, lambda done, total: bar.update(done, total, model=source.text))
    write_profile(profile, place)
    if json:
        output.json_result({**profile.to_dict(), "file": str(place)})
    else:
        rows = [(layer, head, f"{score:.4f}") for layer, head, score in strongest(profile, 10)]
        output.result(output.table(("layer", "head", "score"), rows))
        output.result(str(place))
    own = own_place(source)
    first = own if own is not None and own.is_file() else cache_place(source)  # where methods look first
    found_alone = place.resolve() == first.resolve()
    setting = "" if found_alone else f":profile={place}"
    output.next_command(f"kvcli sweep --model {source.text} --method {_reader()}{setting} --ratio 0.2")


def _reader() -> str:
    """The first method that reads a profile."""
    from kvcli.methods.catalog import build, usable
    from kvcli.models.profiles import is_profile

    return next(name for name in usable() if any(map(is_profile, build(name).needs())))
