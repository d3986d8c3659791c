"""What a careful reader of the engine found, and must not come back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvcli.attention.capture import Needs
from kvcli.cache.rows import Row
from kvcli.config import SweepConfig
from kvcli.engine.generate import Ask, Start, StopRules, generate
from kvcli.engine.memory import Room
from kvcli.engine.pool import lowest
from kvcli.engine.runner import Options, Runner
from kvcli.errors import Exit
from kvcli.models.wrapper import Model
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny


def test_rows_that_ended_do_not_count_positions_past_the_context() -> None:
    """Learned positions: a row whose prompt and answer fill the context ends, others go on beside it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(V.WORDS), n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=None)
    model = Model(GPT2LMHeadModel(config).eval(), build_tokenizer(), name="gpt2")

    def ask(n: int, new: int) -> Ask:
        ids = tiny.prompt(n, n).ids
        dense = model.prefill([ids], Needs(), [0]).dense(0)
        row = Row(dense.keys, dense.values, [torch.arange(n - 1)] * 2)
        return Ask(row, Start(ids[-1], n - 1), StopRules(new), tag=n)

    found = {a.tag: out.ids for a, out in generate(model, [ask(36, 4), ask(5, 30), ask(6, 30)], room=Room(None, 3))}
    alone = {n: next(generate(model, [ask(n, new)]))[1].ids for n, new in ((36, 4), (5, 30), (6, 30))}
    assert found == alone


def test_a_row_that_evicts_only_while_generating_is_no_noop() -> None:
    prompts = dataclasses.replace(tiny.prompt_set([40]))
    config = SweepConfig(methods=("h2o",), budgets=(64,), decode_budgets=(4,), full=False)
    sink = tiny.Memory()
    options = Options(8, max_new_tokens=30, ignore_eos=True)
    Runner(tiny.tiny_llama(), tiny.plan_of(config, prompts), {tiny.KEY: prompts}, sink, options).run()
    (record,) = sink.records
    token = record["kv_bytes"]["full"] // 40
    assert record["kv_bytes"]["end"] == (40 + 4) * token
    assert record["flags"] == []


def test_a_time_limit_gets_past_samples_that_fail_every_time(tmp_path: Path) -> None:
    """Batches with failed rows are open for ever; repeated commands must still reach the others."""
    plugin = tmp_path / "bad.py"
    plugin.write_text(
        "import dataclasses\nfrom kvcli.methods.base import Method\n"
        "@dataclasses.dataclass(frozen=True)\nclass Bad(Method):\n"
        "    def select(self, ctx, budget):\n        raise ValueError('never')\n"
    )
    prompts, model = tiny.prompt_set([30, 32, 34, 36]), tiny.tiny_llama()
    plan = tiny.plan_of(SweepConfig(methods=("h2o", f"{plugin}:Bad"), ratios=("0.5",)), prompts, prefill_rows=1)
    done: set[tuple[str, str]] = set()
    for _ in range(8):
        sink = tiny.Memory(done=done)
        limit = lambda progressed: Exit.STOPPED_EARLY if progressed else None  # noqa: E731  (a limit that is over at once)
        Runner(model, plan, {tiny.KEY: prompts}, sink, Options(8), stop=limit).run()
        done |= {(r["cell_id"], r["sample_id"]) for r in sink.records if r["status"] == "ok"}
    assert len(done) == 8


@pytest.mark.parametrize("count", [1, 3])
def test_a_rank_that_is_no_number_leaves_first(count: int) -> None:
    rank = torch.tensor([[[1.0, float("nan"), float("inf"), 0.5, float("-inf")]]])
    position = torch.tensor([[[0, 1, 2, 3, -1]]])
    gone = lowest(rank, position, position >= 0, torch.tensor([[count]]))
    assert gone[0, 0].nonzero().flatten().tolist() == {1: [1], 3: [0, 1, 3]}[count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_captured_does_not_move_a_16_bit_prefill(dtype: torch.dtype) -> None:
    model, prompt = tiny.tiny_llama(dtype), tiny.prompt(60, 1)
    plain, summed = (model.prefill([prompt.ids], Needs.of(names), [50]) for names in (set(), {"column_sum"}))
    assert torch.equal(plain.logits, summed.logits)
    assert all(torch.equal(a, b) for a, b in zip(plain.keys, summed.keys, strict=True))
