"""Pruning of a whole model: which matrices, in which order, and what is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.models.source import TESTBED_FOLDER
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer
from kvcli.weights import calibration
from kvcli.weights.model import Stopped, prune_model
from kvcli.weights.sparsegpt import Hessian, prune
from kvcli.weights.spec import Calibration, SparseGPT
from tests.engine import tiny

HALF = SparseGPT(sparsity="0.5")


def texts(count: int = 6, n: int = 40) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(4, 400) for _ in range(n + i)] for i in range(count)]


def linear(hf: Any) -> dict[str, nn.Linear]:
    return {name: m for name, m in hf.model.layers.named_modules() if isinstance(m, nn.Linear)}


def test_each_layer_is_pruned_on_what_the_pruned_layers_before_it_give() -> None:
    hf = tiny.tiny_llama(torch.float64).hf
    slow = copy.deepcopy(hf)
    report = prune_model(hf, texts(), HALF, given="x")
    for number in range(3):  # apart from the module under test: whole passes, one hook per matrix
        mine = {name: m for name, m in linear(slow).items() if name.startswith(f"{number}.")}
        hessians = {name: Hessian(m.weight.shape[1], m.weight) for name, m in mine.items()}
        hooks = [
            m.register_forward_hook(lambda _, args, out, h=hessians[name]: h.add(args[0])) for name, m in mine.items()
        ]
        with torch.no_grad():
            for ids in texts():
                slow(torch.tensor([ids]), use_cache=False)
            for hook in hooks:
                hook.remove()
            for name, m in mine.items():
                m.weight.copy_(prune(m.weight, hessians[name].value, HALF.share, None, 128, 0.01).weight)
    for (name, found), wanted in zip(linear(hf).items(), linear(slow).values(), strict=True):
        assert bool(((found.weight == 0) == (wanted.weight == 0)).all()), name
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-6, atol=1e-8)
    assert report.sparsity == 0.5 and report.matrices == 21 and report.texts == 6 and report.tokens == 255


def test_embeddings_norms_and_head_stay() -> None:
    hf = tiny.tiny_llama().hf
    before = copy.deepcopy(hf.state_dict())
    report = prune_model(hf, texts(), SparseGPT(pattern=(2, 4)), given="x")
    for name, value in hf.state_dict().items():
        if ".layers." in name and value.dim() == 2:
            assert bool(((value == 0).view(len(value), -1, 4).sum(-1) == 2).all()), name
        else:
            assert bool((value == before[name]).all()), name
    size = sum(m.weight.numel() for m in linear(hf).values())
    every = sum(p.numel() for p in hf.parameters())
    assert report.parameters == size and report.of_model == pytest.approx(size / 2 / every, abs=1e-7)


def test_pruned_outputs_stay_nearer_to_the_dense_ones_than_with_the_smallest_weights_gone() -> None:
    dense = LlamaForCausalLM.from_pretrained(TESTBED_FOLDER, dtype=torch.float32).eval()
    mine, other = copy.deepcopy(dense), copy.deepcopy(dense)
    own = calibration.sequences(SparseGPT(sparsity="0.5", samples=24), None, None, 256, TESTBED_FOLDER)
    prune_model(mine, own, HALF, given="x")
    for module in linear(other).values():
        size = module.weight.data.abs().flatten()
        module.weight.data.view(-1)[size.argsort()[: len(size) // 2]] = 0
    fresh = calibration.sequences(SparseGPT(sparsity="0.5", samples=8, seed=9), None, None, 256, TESTBED_FOLDER)
    ids = torch.tensor([(text + [0] * 256)[:256] for text in fresh])
    with torch.no_grad():
        wanted, near, far = (hf(ids).logits.log_softmax(-1) for hf in (dense, mine, other))
    kl = [(wanted.exp() * (wanted - x)).sum(-1).mean() for x in (near, far)]
    assert kl[0] < 0.8 * kl[1]


def test_transposed_matrices_are_pruned_along_their_inputs() -> None:
    config = GPT2Config(vocab_size=400, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).eval()
    report = prune_model(hf, texts(), SparseGPT(pattern=(2, 4)), given="x")
    assert report.matrices == 8 and report.sparsity == 0.5
    for block in hf.transformer.h:
        for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            zero = (module.weight.T == 0).reshape(module.weight.shape[1], -1, 4)
            assert bool((zero.sum(-1) == 2).all())


def test_matrices_that_are_not_linear_layers_are_refused_before_anything_changes() -> None:
    hf = tiny.tiny_llama().hf
    hf.model.layers[2].mlp.experts = nn.Parameter(torch.ones(2, 3, 4))
    before = copy.deepcopy(hf.state_dict())
    with pytest.raises(KvcliError, match=r"mlp\.experts is not the matrix of a linear layer"):
        prune_model(hf, texts(), HALF, given="x")
    assert all(bool((value == before[name]).all()) for name, value in hf.state_dict().items())


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(KvcliError, match="no whole groups of 7"):
        prune_model(tiny.tiny_llama().hf, texts(), SparseGPT(pattern=(2, 7), block=126), given="x")


def test_layers_that_do_something_else_one_by_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny.tiny_llama().hf
    layer, calls = hf.model.layers[1], []
    own = layer.forward

    def other(hidden: Any, *args: Any, **named: Any) -> Any:
        calls.append(1)
        return own(hidden, *args, **named) * len(calls)

    monkeypatch.setattr(layer, "forward", other)
    with pytest.raises(KvcliError, match="one by one"):
        prune_model(hf, texts(), HALF, given="x")


def test_it_can_be_stopped_between_layers() -> None:
    asked = []
    with pytest.raises(Stopped):
        prune_model(tiny.tiny_llama().hf, texts(), HALF, given="x", between=lambda *at: asked.append(at) or at[0] == 1)
    assert asked == [(0, 3), (1, 3)]


def test_the_testbed_has_texts_of_its_own_that_no_exam_holds() -> None:
    tokenizer = build_tokenizer()

    def made(seed: int) -> list[list[int]]:
        return calibration.sequences(SparseGPT(sparsity="0.5", samples=16, seed=seed), None, tokenizer, 300,
                                     Path(TESTBED_FOLDER))  # fmt: skip

    first, again, other = made(0), made(0), made(1)
    assert first == again != other
    assert len(first) == 16 and all(ids[0] == V.ID[V.BOS] and 8 <= len(ids) <= 300 for ids in first)
    assert {ids[1] for ids in first} == {V.ID[tag] for tag in V.TAG.values()}
    prompts = {
        tuple(V.ID[w] for w in "".join(s.text for s in sample.segments).split())[:60]
        for task in find_tasks(["testbed"])
        for sample in task.samples(shots=task.shots, shot_seed=0, limit=50, data_dir=None)
    }
    assert len(prompts) == 8 * 50 and not prompts & {tuple(ids[1:61]) for ids in first + other}


def test_a_running_text_is_cut_and_lines_are_drawn_by_the_seed(tmp_path: Path) -> None:
    words = [w for w in V.WORDS if not w.startswith("<")][:100]
    running, lines = tmp_path / "a.txt", tmp_path / "a.lines"
    running.write_text(" ".join(words))
    lines.write_text("\n".join(" ".join(words[i : i + 20]) for i in range(50)) + "\nshort one\n")
    tokenizer = build_tokenizer()
    cut = calibration.sequences(
        SparseGPT(sparsity="0.5", length=25), Calibration.of(str(running)), tokenizer, None, None
    )
    assert [len(ids) for ids in cut] == [25] * 4
    assert [i for ids in cut for i in ids] == tokenizer(" ".join(words))["input_ids"][:100]
    drawn = [
        calibration.sequences(SparseGPT(sparsity="0.5", samples=9, seed=seed), Calibration.of(str(lines)), tokenizer,
                              15, None)
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(ids) == 15 for ids in drawn[0]) and len({tuple(ids) for ids in drawn[0]}) == 9
    few = tmp_path / "few.lines"
    few.write_text("a b\nc\n")
    with pytest.raises(KvcliError, match="no text of at least"):
        calibration.sequences(HALF, Calibration.of(str(few)), tokenizer, None, None)
