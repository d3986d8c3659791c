"""What attn-map.json says of the model, the options and the prompts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvcli.attention import maps
from kvcli.attention.maps import Look
from kvcli.engine.cells import PromptKey
from kvcli.engine.map_numbers import SETS, unknown_tokens
from kvcli.engine.map_request import Chosen, Group
from kvcli.engine.prepare import Prepared
from kvcli.engine.prompts import PromptSet
from kvcli.models.wrapper import Model
from kvcli.results import provenance
from kvcli.spans import REGIONS, question_start

SCHEMA = 1
KINDS = ("special", *REGIONS)


def meta_of(
    model: Model, prepared: Prepared, groups: Sequence[Group], heads: Chosen, prompts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All of attn-map.json; prompts: what each of them says."""
    shapes = model.shapes
    return {
        "schema": SCHEMA,
        "model": {
            **prepared.identity, "name": prepared.request.source.text, "short": prepared.request.source.short,
            "dtype": prepared.dtype, "layers": shapes.layers, "heads": shapes.heads,
            "kv_heads": shapes.kv_heads[0],
        },
        "chosen": {"layer": heads.layer, "head": heads.head, "note": heads.note},
        "sinks": maps.SINKS, "local": maps.LOCAL, "shares": list(maps.SHARES), "measures": list(maps.MEASURES),
        "sets": list(SETS),
        "kinds": list(KINDS), "curves": list(maps.CURVES), "groups": list(_groups(groups)), "prompts": list(prompts),
        "provenance": provenance.collect(),
    }  # fmt: skip


def prompt_facts(prompts: PromptSet, index: int, look: Look, tokenizer: Any, *, text: bool | None) -> dict[str, Any]:
    """What attn-map.json says of one prompt. text: whether its tokens are written out; None where they must not be."""
    prompt = prompts.prompts[index]
    return {
        "sample": prompts.samples[index].id, "n": look.n, "hidden": text is None,
        "regions": [[r.label, r.start, r.end] for r in prompt.regions],
        "tokens": [prompt.token_text(i) for i in range(look.n)] if text else None,
        "block": look.block, "small": look.small,
        "measured": {name: len(rows) for name, rows in look.rows.items()},
        "queries": {"all": look.n, "question": look.n - question_start(prompt.regions)},
        "truncated": prompt.truncated, "unknown": unknown_tokens(tokenizer, prompt.ids),
    }  # fmt: skip


def _groups(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    sets = [group.whole for group in groups]
    for s in sets:
        key, label = s.key, _label(s.key, [other.key for other in sets])
        yield {"task": s.task.name, "label": label, "ability": s.task.ability, "shots": key.shots,
               "shot_seed": key.shot_seed, "shot_order": key.shot_order, "harmful": s.task.harmful,
               "samples": len(s.samples)}  # fmt: skip


def _label(key: PromptKey, keys: Sequence[PromptKey]) -> str:
    """A task's name, and in what its prompts are unlike those of the same task beside it."""
    alike = [other for other in keys if other.task == key.task]
    said = {
        "shots": f"{key.shots} shot{'s' * (key.shots != 1)}", "shot_seed": f"shot seed {key.shot_seed}",
        "shot_order": f"shot order {key.shot_order}",
    }  # fmt: skip
    unlike = [text for name, text in said.items() if len({getattr(other, name) for other in alike}) > 1]
    return ", ".join([key.task, *unlike])
