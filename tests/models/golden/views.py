"""The ways in which a prompt is built here: real tokenizer files, raw or with a chat template.

Qwen2.5, Qwen3 and TinyLlama bring their own templates. Those of Llama 3, Mistral and R1 were written for the tests
(tests/models/templates) and stand on real vocabularies: Llama 3 and R1 on Qwen2.5's, with their special tokens added,
Mistral on TinyLlama's, which is Llama 2's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvcli.evals.spec import Sample
from kvcli.models.prompt import Prompt, build_prompt

SHARED = Path(__file__).parents[4] / "shared"
TOKENIZERS = SHARED / "tokenizers"
TEMPLATES = Path(__file__).parents[1] / "templates"
GPT2, TINYLLAMA, QWEN2, QWEN3 = "gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B"
REAL = (GPT2, TINYLLAMA, QWEN2, QWEN3)
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "r1": ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>"],
}


@dataclass(frozen=True)
class View:
    """files: whose vocabulary; written: a template of this folder's neighbour; bos: how many the prompt has."""

    name: str
    files: str
    template: str
    bos: int = 0
    written: str = ""
    thinking: bool = False

    @property
    def tokenizer(self) -> Any:
        return written(self.files, self.written) if self.written else real(self.files)

    def build(self, sample: Sample, **options: Any) -> Prompt:
        return build_prompt(sample, self.tokenizer, template=self.template, thinking=self.thinking, **options)


VIEWS = (
    View("gpt2 raw", GPT2, "raw"),
    View("tinyllama raw", TINYLLAMA, "raw", 1),
    View("tinyllama chat", TINYLLAMA, "chat", 1),
    View("qwen2.5 raw", QWEN2, "raw"),
    View("qwen2.5 chat", QWEN2, "chat"),
    View("qwen3 raw", QWEN3, "raw"),
    View("qwen3 chat", QWEN3, "chat"),
    View("qwen3 chat thinking", QWEN3, "chat", thinking=True),
    View("llama3 raw", QWEN2, "raw", 1, "llama3"),
    View("llama3 chat", QWEN2, "chat", 1, "llama3"),
    View("mistral chat", TINYLLAMA, "chat", 1, "mistral"),
    View("r1 chat", QWEN2, "chat", 1, "r1"),
)

TASK_VIEWS = tuple(view for view in VIEWS if view.name not in ("llama3 raw", "qwen3 chat thinking"))
"""For every task's prompts: without the two that differ from another only in their first or last tokens."""


@cache
def real(name: str) -> Any:
    """The tokenizer of real files, or the running test is skipped."""
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no tokenizer files in {TOKENIZERS / name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZERS / name)


@cache
def written(files: str, template: str) -> Any:
    """A copy of a real tokenizer with a template written for the tests; one with special tokens puts a BOS in front."""
    tokenizer = copy.deepcopy(real(files))
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    special = SPECIAL.get(template, [])
    if special:
        from tokenizers import processors

        tokenizer.add_special_tokens({"bos_token": special[0], "additional_special_tokens": special[1:]})
        bos = (special[0], tokenizer.bos_token_id)
        front = processors.TemplateProcessing(single=f"{bos[0]}:0 $A:0", pair=None, special_tokens=[bos])
        tokenizer.backend_tokenizer.post_processor = front
    return tokenizer
