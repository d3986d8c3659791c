"""The testbed's architecture, tokenizer and structured initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.testbed import vocabulary as V

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """Size of a testbed model; the default is the shipped one (0.65 M parameters)."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 256
    theta: float = 1e5
    positions: int = 1024


def build(shape: Shape) -> LlamaForCausalLM:
    """An untrained LlamaForCausalLM of this shape with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(V.WORDS), hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=shape.positions, bos_token_id=V.ID[V.BOS], eos_token_id=V.ID[V.END],
        pad_token_id=V.ID[V.PAD], rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per white-space separated word; `<bos>` is added in front, as Llama tokenizers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(V.ID, unk_token=V.UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"{V.BOS} $A", special_tokens=[(V.BOS, V.ID[V.BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=V.BOS, eos_token=V.END, unk_token=V.UNKNOWN, pad_token=V.PAD
    )


def structured_init(model: LlamaForCausalLM, shape: Shape, seed: int) -> None:
    """Random weights arranged so that look-up circuits are close at hand; training moves every one of them.

    From an ordinary random start a model this small stays on the plateau before induction heads form. Here

    - embeddings share a mean direction `u`; 16 dimensions `identity` say which token it is; two empty subspaces
      `prev1`, `prev2` are where layer 0 writes the identity of the previous token and the one before;
    - layer 0, KV head 0 finds those tokens through RoPE's fast frequencies (a query turned back by 1 or 2 positions);
    - layers 1 and 2 start as match heads on the slow frequencies: my identity = your previous token (induction), same
      previous token (going on with a list), same identity (what stood before an earlier copy);
    - the MLP and attention outputs start small, else their noise buries these subspaces.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim, group = shape.hidden, shape.hidden // shape.heads, shape.heads // shape.kv_heads
    half = rank = head_dim // 2
    match, write, transfer, boost, noise = 3.0, 0.25, 0.25, 2.0, 0.3

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def orthogonal(rows: int, columns: int) -> torch.Tensor:
        return torch.linalg.qr(randn(rows, columns))[0]

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            std = 0.1 if "embed" in name else 1 / math.sqrt(weight.shape[1])
            if "o_proj" in name or "down_proj" in name:
                std *= (0.3 if "o_proj" in name else 0.2) / math.sqrt(2 * shape.layers)
            weight.copy_(randn(*weight.shape) * std)

        basis = orthogonal(hidden, hidden)
        u, identity = basis[:, 0], basis[:, 1 : 1 + rank].T
        prev1, prev2 = basis[:, 1 + rank : 1 + 2 * rank], basis[:, 1 + 2 * rank : 1 + 3 * rank]

        embedding = model.get_input_embeddings().weight
        embedding.sub_(torch.outer(embedding @ u, u))
        for empty in (prev1, prev2):
            embedding.sub_((embedding @ empty) @ empty.T)
        embedding.add_((boost - 1) * (embedding @ identity.T) @ identity)
        embedding.add_(0.5 * embedding.norm(dim=1).mean() * u)

        frequency = 1.0 / (shape.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
        slow = range(half // 2, half)
        place = torch.zeros(head_dim, rank)
        for column, i in enumerate(slow):
            place[i, column] = 1
            place[i + half, column + len(slow)] = 1

        for index, layer in enumerate(model.model.layers[:3]):
            attention = layer.self_attn

            def rows(weight: torch.Tensor, head: int) -> torch.Tensor:
                return weight[head * head_dim : (head + 1) * head_dim]

            q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
            o = attention.o_proj.weight.T
            if index == 0:
                fast = 5
                key = torch.zeros(head_dim)
                key[:fast] = 1.3
                rows(k, 0).mul_(noise / 2).add_(torch.outer(key, u))
                rows(v, 0).mul_(noise)
                rows(v, 0)[:rank].copy_(identity)
                for head, (distance, target) in enumerate(((1, prev1), (2, prev2))):
                    query = torch.zeros(head_dim)
                    query[:fast] = torch.cos(frequency[:fast] * distance) * 1.5
                    query[half : half + fast] = -torch.sin(frequency[:fast] * distance) * 1.5
                    rows(q, head).mul_(noise / 2).add_(torch.outer(query, u))
                    rows(o, head).mul_(noise)
                    rows(o, head)[:rank].add_(write * target.T)
            else:
                carry = orthogonal(hidden, head_dim).T
                carry[:rank] = identity
                rows(k, 0).mul_(noise).add_(place @ prev1.T)
                rows(q, 0).mul_(noise).add_(match * place @ identity)
                rows(q, 1).mul_(noise).add_(match * place @ prev1.T)
                rows(v, 0).mul_(noise).add_(carry)
                for head in (0, 1):
                    rows(o, head).mul_(noise).add_(transfer * carry)
                rows(k, 1).mul_(noise).add_(place @ identity)
                rows(q, group).mul_(noise).add_(match * place @ identity)
                rows(v, 1).mul_(noise)
                rows(v, 1)[:rank].add_(prev1.T)
                rows(o, group).mul_(noise)
                rows(o, group)[:rank].add_(transfer * identity)
