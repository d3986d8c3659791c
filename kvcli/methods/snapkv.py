"""SnapKV: the keys that the prompt's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass

from kvcli.methods._window import WindowMethod


@dataclass(frozen=True)
class SnapKV(WindowMethod):
    """Top keys per KV head by the pooled attention of an observation window; the window is kept.

    Source: arXiv:2404.14469, section 4; defaults as in the paper's LongBench runs. Differs: one set per KV head (mean
    over its query heads), the official code keeps one per query head.
    """

    name = "snapkv"
    title = "SnapKV"
    paper = "arXiv:2404.14469"
    tier = 1
    protects = "the observation window, at most half of the budget"
