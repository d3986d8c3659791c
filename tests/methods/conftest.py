"""Shares prompts whose attention is computed once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.oracles.prompts import Prompt, random_prompt


@cache
def _prompt(n: int, group: int, regions: str, seed: int) -> Prompt:
    return random_prompt(n, group=group, regions=regions, seed=seed)


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., Prompt]:
    """prompt_of(n, group=2, regions="shots", seed=0): 3 layers, 2 KV heads, `group` query heads for each."""

    def make(n: int, group: int = 2, regions: str = "shots", seed: int = 0) -> Prompt:
        return _prompt(n, group, regions, seed)

    return make
