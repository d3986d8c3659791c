"""kvcli sweep: a grid of methods, kept ratios and tasks from one prefill per prompt."""

from __future__ import annotations

import typer

from kvcli.cli import options as o


def command(
    method: o.Methods = None, ratio: o.Ratios = None, budget: o.Budgets = None, match: o.Match = None,
    task: o.Tasks = None,
    shots: o.Shots = None, seed: o.Seeds = None, shot_seed: o.ShotSeeds = None, shot_order: o.ShotOrders = None,
    query: o.Query = None, first_token: o.FirstToken = None,
    full: o.NoFull = None,
    weights: o.Weights = None, calib: o.Calib = None,
    strict_window: o.StrictWindow = None, decode_ratio: o.DecodeRatio = None, decode_budget: o.DecodeBudget = None,
    decode_interval: o.DecodeInterval = None, cap: o.Cap = None, temperature: o.Temperature = None,
    top_p: o.TopP = None, draws: o.Draws = None, limit: o.Limit = None,
    model: o.Model = None, tokenizer: o.Tokenizer = None, dtype: o.Dtype = None, device: o.Device = None,
    attn: o.Attn = None, template: o.Template = None,
    system: o.System = None, thinking: o.Thinking = None, trust_remote_code: o.TrustRemoteCode = None,
    kvpress_python: o.KvpressPython = None,
    max_new_tokens: o.MaxNewTokens = None, max_prompt_tokens: o.MaxPromptTokens = None, truncate: o.Truncate = None,
    ignore_eos: o.IgnoreEos = None,
    data_dir: o.DataDir = None, out: o.Out = None, keep_maps: o.KeepMaps = None, store_prompts: o.StorePrompts = None,
    prefill_batch: o.PrefillBatch = None, decode_batch: o.DecodeBatch = None, memory: o.Memory = None,
    threads: o.Threads = None, max_time: o.MaxTime = None, deterministic: o.Deterministic = None,
    fidelity: o.Fidelity = None, unsafe_exec: o.UnsafeExec = None, preset: o.Preset = None, config: o.ConfigFile = None,
    json: o.Json = False, dry_run: o.DryRun = False,
) -> None:  # fmt: skip
    """Measure a grid of methods, kept ratios and tasks.

    Every prompt is prefilled once for all methods and ratios; the full cache is always measured beside them. The
    same command resumes, and a folder's grid may grow.

    \b
    Examples:
      kvcli sweep --model testbed --method shotkv --ratio 0.1
      kvcli sweep --method tier1 --ratio 0.1..0.9:0.2 --limit 50
      kvcli sweep --model llama3-8b --method snapkv,h2o --ratio 0.2 -t gsm8k
      kvcli sweep --method snapkv --ratio 0.3 --weights dense,sparsegpt:sparsity=0.5
      kvcli sweep --method ./mine.py:MyMethod,tier1 --ratio 0.3 --dry-run
    """
    typed = dict(locals())
    preset, config, json, dry_run = (typed.pop(name) for name in ("preset", "config", "json", "dry_run"))
    given = o.collect(typed)
    from kvcli.cli.running import perform

    raise typer.Exit(perform(o.layered(given, preset, config), given, dry_run=dry_run, json=json))
