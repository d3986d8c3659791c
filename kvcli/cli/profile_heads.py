"""kvcli profile-heads: how much each attention head of a model retrieves, and other files that methods read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli import options
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.engine.gates import Training

PANEL = "DuoAttention's gates"
BASES = "Bases of keys and values"


def _of_gates(name: str, help: str, least: float) -> Any:
    return typer.Option(name, min=least, help=help, show_default=False, rich_help_panel=PANEL)


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
        typer.Option(
            "--out", "-o", help="File to write, of gates a folder \\[default: in the user's cache].", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    gates: Annotated[
        bool, typer.Option("--gates", help="Train a gate for each KV head instead.", rich_help_panel=PANEL)
    ] = False,
    sinks: Annotated[int | None, _of_gates("--sinks", "First tokens a streaming head sees \\[default: 64].", 0)] = None,
    recent: Annotated[int | None, _of_gates("--recent", "Newest tokens it sees \\[default: 256].", 1)] = None,
    steps: Annotated[int | None, _of_gates("--steps", "Steps of the training \\[default: 500].", 1)] = None,
    penalty: Annotated[
        float | None, _of_gates("--penalty", "Weight of the mean gate in the loss \\[default: 0.05].", 0)
    ] = None,
    seed: Annotated[int | None, _of_gates("--seed", "Order of the prompts \\[default: 0].", 0)] = None,
    bases: Annotated[
        bool,
        typer.Option("--bases", help="Measure directions of keys and values instead.", rich_help_panel=BASES),
    ] = False,
    calib: Annotated[
        str | None,
        typer.Option("--calib", help="File of texts, instead of a task.", show_default=False, rich_help_panel=BASES),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            "--group", min=1, help="KV heads taken together \\[default: 4].", show_default=False, rich_help_panel=BASES
        ),
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
    --out MODEL/head_profile.json puts it into the model's own folder. A file of other weights or settings is replaced
    with --force only.

    --gates trains what duo_attention:heads=optimise reads: how much each KV head needs more than its first and newest
    tokens for the model's last states to stay what they are. It writes the authors' full_attention_heads.tsv.

    --bases reads texts of --calib (.txt a running text, .jsonl or any other one text per line; --limit of them,
    --prompt-tokens each, 2048 unless given) or the prompts of --task, and writes what lowrank:basis=calibrated reads.
    Models of the testbed's language need neither.

    \b
    Examples:
      kvcli profile-heads
      kvcli profile-heads --model ./my-testbed/model --out my-testbed/model/head_profile.json
      kvcli profile-heads --model qwen2.5-0.5b-instruct --limit 100 --prompt-tokens 4000
      kvcli profile-heads --gates --sinks 4 --recent 60
      kvcli profile-heads --bases
      kvcli profile-heads --bases --model qwen2.5-0.5b-instruct --calib texts.jsonl
    """
    from kvcli.cli.profile_heads_making import make, show
    from kvcli.cli.running import quiet_libraries
    from kvcli.engine.checking import check_model_options
    from kvcli.models.source import parse_model

    source = parse_model(model or "testbed")
    typed = {"sinks": sinks, "recent": recent, "steps": steps, "penalty": penalty, "seed": seed}
    _check_bases(bases, gates, wrong_too, calib, group, out)
    _check_kind(gates, typed, wrong_too, out)
    check_model_options(dtype or "auto", template or "auto", attn or "auto", threads)
    quiet_libraries()
    from kvcli.engine.profiling import Settings
    from kvcli.models.profiles import cache_place, gates_place

    asked = Settings(
        task, limit, prompt_tokens, wrong_too, tokenizer, dtype or "auto", device or "auto", attn or "auto", threads,
        template or "auto", bool(trust_remote_code), data_dir,
    )  # fmt: skip
    if bases:
        from kvcli.cli.profile_heads_bases import bases as make_bases

        make_bases(source, asked, calib, group, out, force=force, json=json)
        return
    training = _training(typed) if gates else None
    place = out or (gates_place(source, training.sinks, training.recent) if training else cache_place(source))
    show(source, make(source, asked, training, place, force=force), place, json=json)


def _check_kind(gates: bool, typed: dict[str, Any], wrong_too: bool, out: Path | None) -> None:
    """Options of the one kind given with the other, and a place that cannot hold it."""
    alone = [f"--{name} {value}" for name, value in typed.items() if value is not None]
    if alone and not gates:
        raise KvcliError("only --gates has such a setting", given=" ".join(alone), fix="--gates, or leave it out")
    if wrong_too and gates:
        what = "gates need no right answers: the model is compared with itself"
        raise KvcliError(what, given="--gates --wrong-too", fix="leave out --wrong-too")
    if out is not None and out.is_dir() and not gates:
        raise KvcliError(f"{out} is a folder", given=f"--out {out}", fix=f"--out {out / 'head_profile.json'}")
    if out is not None and out.is_file() and gates:
        raise KvcliError(f"{out} is a file", given=f"--gates --out {out}", fix="--out with a folder")


def _check_bases(
    bases: bool, gates: bool, wrong_too: bool, calib: str | None, group: int | None, out: Path | None
) -> None:
    """Raises KvcliError for options of bases without them, and for others beside them."""
    alone = [f"--calib {calib}"] * (calib is not None) + [f"--group {group}"] * (group is not None)
    if alone and not bases:
        raise KvcliError("only --bases has such a setting", given=" ".join(alone), fix="--bases, or leave it out")
    if bases and gates:
        raise KvcliError("--bases and --gates make different files", given="--bases --gates", fix="one after the other")
    if bases and wrong_too:
        given = "--bases --wrong-too"
        raise KvcliError("bases need no right answers: nothing is answered", given=given, fix="leave out --wrong-too")
    if bases and out is not None and out.is_dir():
        raise KvcliError(f"{out} is a folder", given=f"--out {out}", fix=f"--out {out / 'kv_bases.st'}")


def _training(typed: dict[str, Any]) -> Training:
    from kvcli.engine.gates import Training

    return Training(**{name: value for name, value in typed.items() if value is not None})
