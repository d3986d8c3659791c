"""Model families: those that go through the patch decode as transformers does, the others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcli.config import SweepConfig
from kvcli.errors import KvcliError
from kvcli.models.wrapper import Model
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny

LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": None, "head_dim": 8},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0, "sliding_window": None},
    "olmo2": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "starcoder2": {**LLAMA_LIKE, "sliding_window": None},
    "smollm3": {**LLAMA_LIKE, "pad_token_id": 0},
    "phi": LLAMA_LIKE,
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"},
    "gpt2": GPT_LIKE,
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 256},
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "falcon"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom"),
    "gemma2": ({**LLAMA_LIKE, "head_dim": 8}, "soft-capped|sliding-window"),
    "gpt_oss": (
        {**LLAMA_LIKE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "sinks|sliding-window",
    ),
    "mistral": ({**LLAMA_LIKE, "sliding_window": 16, "head_dim": 8}, "sliding-window"),
    "llama4_text": (
        {**LLAMA_LIKE, "head_dim": 8, "attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "chunked",
    ),
    "bert": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "ahead|own",
    ),
    "roberta": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "is_decoder": True,
            "pad_token_id": 0,
        },
        "its own logits",
    ),
    "phi3": (
        {
            **LLAMA_LIKE,
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
        "longrope",
    ),
}


def random_model(family: str, sizes: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(family, vocab_size=len(V.WORDS), **sizes)
    for name in ("bos_token_id", "eos_token_id"):
        setattr(config, name, {"bos_token_id": 1, "eos_token_id": 2}[name])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # away from flat attention
    return model


@pytest.mark.parametrize("family", SUPPORTED)
def test_family_decodes_as_transformers_does_and_evicts(family: str) -> None:
    hf = random_model(family, SUPPORTED[family])
    model = Model(hf, build_tokenizer(), name=family)
    prompts = tiny.prompt_set([40, 26])
    config = SweepConfig(methods=("snapkv", "h2o", "shotkv", "streaming_llm"), ratios=("0.4", "1"))
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    hf.set_attn_implementation("sdpa")
    for record in sink.records:
        ids = prompts.prompts[int(record["sample_id"][1:])].ids
        if record["ratio"] == 1.0:
            plain = hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert record["output_ids"] == plain[0, len(ids) :].tolist(), record["method"]
        else:
            assert record["measured_ratio"] < 1


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_cannot_be_patched_is_refused_by_name(family: str) -> None:
    sizes, reason = REFUSED[family]
    hf = random_model(family, sizes)
    with pytest.raises(KvcliError, match=reason) as error:
        Model(hf, build_tokenizer(), name=f"my-{family}")
    assert family in error.value.what
    assert error.value.given == f"--model my-{family}"
    assert hf.config._attn_implementation != "kvcli"
