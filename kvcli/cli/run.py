"""kvcli run: one cell."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcli.cli import options as o

OneMethod = Annotated[
    str | None,
    typer.Option(
        "--method", "-M", help="One method with settings \\[default: full].", metavar="METHOD", show_default=False
    ),
]
OneTask = Annotated[str, typer.Option("--task", "-t", help="One task.", metavar="TASK", show_default=False)]
OneRatio = Annotated[
    str | None, typer.Option("--ratio", "-r", help="One kept ratio.", metavar="RATIO", show_default=False)
]


def command(
    task: OneTask, method: OneMethod = None, ratio: OneRatio = None, budget: o.Budgets = None, shots: o.Shots = None,
    seed: o.Seeds = None, shot_seed: o.ShotSeeds = None, shot_order: o.ShotOrders = None,
    query: o.Query = None, first_token: o.FirstToken = None, full: o.NoFull = None,
    weights: o.Weights = None, calib: o.Calib = None,
    strict_window: o.StrictWindow = None, decode_ratio: o.DecodeRatio = None, decode_budget: o.DecodeBudget = None,
    decode_interval: o.DecodeInterval = None, cap: o.Cap = None, temperature: o.Temperature = None,
    top_p: o.TopP = None, draws: o.Draws = None, limit: o.Limit = None, model: o.Model = None,
    tokenizer: o.Tokenizer = None,
    dtype: o.Dtype = None, device: o.Device = None, attn: o.Attn = None, template: o.Template = None,
    system: o.System = None, thinking: o.Thinking = None,
    trust_remote_code: o.TrustRemoteCode = None,
    kvpress_python: o.KvpressPython = None, max_new_tokens: o.MaxNewTokens = None,
    max_prompt_tokens: o.MaxPromptTokens = None, truncate: o.Truncate = None,
    ignore_eos: o.IgnoreEos = None, data_dir: o.DataDir = None,
    out: o.Out = None, keep_maps: o.KeepMaps = None, store_prompts: o.StorePrompts = None,
    prefill_batch: o.PrefillBatch = None, decode_batch: o.DecodeBatch = None, memory: o.Memory = None,
    threads: o.Threads = None, max_time: o.MaxTime = None, deterministic: o.Deterministic = None,
    fidelity: o.Fidelity = None, unsafe_exec: o.UnsafeExec = None, config: o.ConfigFile = None, json: o.Json = False,
    dry_run: o.DryRun = False,
) -> None:  # fmt: skip
    """Measure one method at one kept ratio on one task.

    The full cache is measured on the same samples (--no-full leaves it out). A sweep into the same folder adds to it.

    \b
    Examples:
      kvcli run --task tb_recall --method snapkv --ratio 0.2
      kvcli run --model ./my-llama -t gsm8k -M h2o -r 0.5 --data-dir data
    """
    typed = dict(locals())
    config, json, dry_run = (typed.pop(name) for name in ("config", "json", "dry_run"))
    given = o.collect(typed)
    from kvcli.cli.running import one_cell, perform

    raise typer.Exit(perform(one_cell(o.layered(given, None, config)), given, dry_run=dry_run, json=json))
