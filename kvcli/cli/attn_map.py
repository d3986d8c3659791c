"""kvcli attn-map: pictures of what a model attends to and of what methods throw away."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli import options as o
from kvcli.cli import output
from kvcli.cli.attn_map_given import check_out, given_texts, say_next
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.analysis.attention.data import Atlas
    from kvcli.analysis.figures.style import Style
    from kvcli.engine.map_request import Asked

_PICTURE = "Pictures"
DEFAULT_RATIO = "0.2"
DEFAULT_LIMIT = 4
QUERIES = ("all", "question")


def _option(*names: str, help: str, metavar: str | None = None, show_default: bool | str = False) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PICTURE, metavar=metavar, show_default=show_default)


def command(
    model: o.Model = None, task: o.Tasks = None,
    sample: Annotated[
        list[str] | None, _option("--sample", help="Only these samples of the tasks, by id.", metavar="ID")
    ] = None,
    text: Annotated[list[str] | None, _option("--text", help="A prompt, instead of a task.", metavar="TEXT")] = None,
    file: Annotated[
        list[Path] | None, _option("--file", help="A text file that is a prompt, instead of a task.", metavar="FILE")
    ] = None,
    limit: Annotated[
        int | None,
        _option("--limit", "-n", help="First N samples of each task's fixed permutation; the first is drawn.",
                metavar="N", show_default=str(DEFAULT_LIMIT)),
    ] = None,
    shots: o.Shots = None, shot_seed: o.ShotSeeds = None, shot_order: o.ShotOrders = None,
    method: o.Methods = None,
    ratio: Annotated[
        list[str] | None,
        _option("--ratio", "-r", help="Kept ratios: 0.1,0.5 or 0.1..0.9:0.2.", metavar="RATIOS",
                show_default=f"{DEFAULT_RATIO} without --budget"),
    ] = None,
    budget: o.Budgets = None, query: o.Query = None, seed: o.Seeds = None, strict_window: o.StrictWindow = None,
    layer: Annotated[
        str | None,
        _option("--layer", help="Layer of the map, counted from 0, or mean.", metavar="N|mean",
                show_default="15, the paper's; scaled on smaller models"),
    ] = None,
    head: Annotated[
        str | None,
        _option("--head", help="Head of the map, counted from 0, or mean.", metavar="N|mean",
                show_default="10, the paper's; scaled on smaller models"),
    ] = None,
    blocks: Annotated[
        int, _option("--blocks", help="Most rows and columns of the map; longer prompts are pooled.", metavar="N",
                     show_default=True)
    ] = 512,
    queries: Annotated[
        str, _option("--queries", help="Whose attention is measured: all, or question.", metavar="WHOSE",
                     show_default=True)
    ] = "all",
    html: Annotated[bool, _option("--html", help="Write a page to explore as well.")] = False,
    style: Annotated[
        str, _option("--style", help="paper: column widths and type of a print page.", metavar="screen|paper",
                     show_default=True)
    ] = "screen",
    theme: Annotated[
        str, _option("--theme", help="Colour of the figures' page.", metavar="light|dark", show_default=True)
    ] = "light",
    formats: Annotated[
        str | None,
        _option("--format", help="png, pdf or svg, joined by commas.", metavar="LIST",
                show_default="png,pdf; with --style paper pdf"),
    ] = None,
    out: Annotated[
        Path | None,
        _option("--out", "-o", help="Folder to write into.", metavar="FOLDER", show_default="attn-maps/MODEL-HASH"),
    ] = None,
    store_prompts: o.StorePrompts = None, tokenizer: o.Tokenizer = None, dtype: o.Dtype = None,
    device: o.Device = None, attn: o.Attn = None, template: o.Template = None, system: o.System = None,
    trust_remote_code: o.TrustRemoteCode = None, max_prompt_tokens: o.MaxPromptTokens = None,
    truncate: o.Truncate = None, threads: o.Threads = None, data_dir: o.DataDir = None, json: o.Json = False,
) -> None:  # fmt: skip
    """Draw what a model attends to and what methods throw away.

    Writes figures (the map of a head with the prompt's regions, measures of all heads, attention per region and shot,
    cumulative curves, and with --method which tokens are kept) and the data behind them as attn-map.npz and
    attn-map.json; --html adds one page to explore. Several tasks are drawn side by side. No n x n tensor over all heads
    is made, so that long prompts work. --query agnostic shows what is kept
    before the question is known. The text of harmful prompts is left out unless --store-prompts is given.

    \b
    Examples:
      kvcli attn-map --task tb_arithmetic,tb_safety --method snapkv,shotkv --ratio 0.2 --html
      kvcli attn-map --model llama3.1-8b-instruct --task mmlu,commonsense_qa,gsm8k,jailbreakv
      kvcli attn-map --text "red fish black goat white wolf" --layer mean --head mean
    """
    typed = {
        "model": model, "method": method, "ratio": ratio, "task": task, "budget": budget, "seed": seed, "shots": shots,
        "decode_budget": None, "shot_seed": shot_seed, "shot_order": shot_order, "first_token": None, "query": query,
        "system": system, "decode_ratio": None, "strict_window": strict_window, "limit": limit,
        "store_prompts": store_prompts, "tokenizer": tokenizer, "dtype": dtype, "device": device, "attn": attn,
        "template": template, "trust_remote_code": trust_remote_code, "max_prompt_tokens": max_prompt_tokens,
        "truncate": truncate, "threads": threads, "data_dir": data_dir,
    }  # fmt: skip
    picked = {"layer": layer, "head": head, "blocks": blocks, "samples": tuple(sample or ())}
    drawing = Drawing(queries, html, formats or ("pdf" if style == "paper" else "png,pdf"), style, theme)
    perform(typed, picked, given_texts(text or [], file or [], task, sample), drawing, out, json)


@dataclass(frozen=True)
class Drawing:
    """How figures are drawn, as typed. queries: whose attention they measure."""

    queries: str
    html: bool
    formats: str
    style: str
    theme: str


def perform(
    typed: dict[str, Any], picked: dict[str, Any], texts: tuple[tuple[str, str], ...], drawing: Drawing,
    out: Path | None, json: bool,
) -> None:  # fmt: skip
    """Checks, maps, draws, says what was written. Raises KvcliError for everything the user can mend."""
    from kvcli.cli.running import quiet_libraries
    from kvcli.config import stable_hash
    from kvcli.engine.checking import one_of, positive
    from kvcli.models.source import parse_model

    config = _config(typed)
    source = parse_model(config.model)
    one_of("--queries", drawing.queries, QUERIES)
    positive("--blocks", picked["blocks"])
    wanted = [name.strip() for name in drawing.formats.split(",")]
    from kvcli.analysis.attention.plots import check_formats
    from kvcli.analysis.figures.style import style

    check_formats(wanted)
    look = style(drawing.style, drawing.theme)
    asked = [config.to_dict(), picked, texts]
    folder = out or Path("attn-maps") / f"{source.short}-{stable_hash(asked, 8)}"
    check_out(folder)
    quiet_libraries()
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # torch reads it once, when it is imported
    from kvcli.engine.map_request import Asked, request_of

    request = Asked(config, texts=texts, **picked)
    request_of(request)
    output.note(f"figures: {folder}")
    found = _mapped(request)
    files = _written(found, folder, wanted, drawing, look)
    if json:
        output.json_result({"folder": str(folder), **{kind: list(map(str, paths)) for kind, paths in files.items()}})
    else:
        output.result("\n".join(str(path) for paths in files.values() for path in paths))
    say_next(found, request)


def _config(typed: dict[str, Any]) -> Any:
    """The config of a sweep that would see the same prompts and cells; without methods only the full cache."""
    config = o.layered(o.collect(typed), None, None)
    import dataclasses

    methods = config.methods or ("full",)
    ratios = config.ratios or (() if config.budgets else (DEFAULT_RATIO,))
    limit = config.limit if config.limit is not None else DEFAULT_LIMIT
    # methods that evict the last prompt token as well can be asked too: nothing is generated here
    return dataclasses.replace(config, methods=methods, ratios=ratios, limit=limit, first_token=("prefill",))


def _mapped(request: Asked) -> Atlas:
    from kvcli.analysis.attention.data import Atlas
    from kvcli.engine.mapping import map_prompts

    with output.progress("attention") as bar:
        found = map_prompts(request, output.note, lambda done, total, what: bar.update(done, total, task=what))
    for warning in [*found.warnings, *_unknown(found.meta, request)]:
        output.warn(warning)
    if found.meta["chosen"]["note"]:
        chosen = found.meta["chosen"]
        output.note(f"map: layer {chosen['layer']}, head {chosen['head']} ({chosen['note']})")
    return Atlas(found.meta, found.arrays)


def _unknown(meta: dict[str, Any], request: Asked) -> list[str]:
    """Of a user's own texts, how much of them the model does not read as it stands there."""
    if not request.texts:
        return []
    counted = [(prompt["sample"], len(prompt["unknown"]), prompt["n"]) for prompt in meta["prompts"]]
    return [
        f"{name}: {some} of {n} tokens are unknown to the tokenizer, the model sees <unk> instead"
        for name, some, n in counted
        if some
    ]


def _written(
    found: Atlas, folder: Path, formats: list[str], drawing: Drawing, look: Style
) -> dict[str, list[Path]]:  # fmt: skip
    """Raises KvcliError where the folder cannot be written."""
    try:
        return _files(found, folder, formats, drawing, look)
    except OSError as e:
        raise KvcliError(f"cannot write {folder}: {e.strerror}", given=f"--out {folder}", fix="another --out") from e


def _files(found: Atlas, folder: Path, formats: list[str], drawing: Drawing, look: Style) -> dict[str, list[Path]]:
    from kvcli.analysis.attention.data import NAME, write
    from kvcli.analysis.attention.plots import draw

    files = {"figures": draw(found, folder, formats, drawing.queries, look), "data": write(found, folder), "pages": []}
    if drawing.html:
        from kvcli.analysis.attention.page import page

        files["pages"].append(folder / f"{NAME}.html")
        files["pages"][0].write_text(page(found), encoding="utf-8")
    return files
