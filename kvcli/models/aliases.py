"""Short names of models and the hub ids behind them. A bare word that is not here is an error, never looked up."""

from __future__ import annotations

TESTBED = "testbed"

TESTBEDS: dict[str, tuple[str, str]] = {
    TESTBED: ("weights", "testbed"),
    "testbed-seed2": ("weights-seed2", "testbed"),
    "testbed-deep": ("weights-deep", "testbed_deep"),
}
"""Models that come with kvcli: their folder in kvcli/testbed, and the suite of tasks that they can answer."""

ALIASES: dict[str, str] = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-8b-base": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
