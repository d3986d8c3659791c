"""The model under each kind of weights, one at a time: dense as it was loaded, then pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcli.engine.prepare import Prepared
from kvcli.kvpress import client as kvpress
from kvcli.models import loader
from kvcli.models.wrapper import Model
from kvcli.weights.model import prune_model
from kvcli.weights.spec import DENSE


@dataclass
class Models:
    """Hands out the model of a run. note: told what pruning did, for run.json; stop: asked between two layers; watch:
    told, before each layer, which one is pruned."""

    prepared: Prepared
    say: Callable[[str], None]
    note: Callable[[str, dict[str, Any]], None]
    stop: Callable[[], bool]
    watch: Callable[[str], None] = lambda text: None
    weights: str = DENSE
    _hf: Any = None

    def enter(self, weights: str) -> Model:
        """The model with these weights; the one handed out before is no longer what it was.

        Dense weights that are loaded are pruned in place; those that are pruned already are loaded anew. Raises
        kvcli.weights.model.Stopped where the command was asked to stop meanwhile.
        """
        if self._hf is None or self.weights != DENSE:
            kvpress.serve(None)
            self._hf = None  # two models may not fit
            self._hf = self._load()
            self.weights = DENSE
        if weights != DENSE:
            self.weights = weights  # from the first layer on
            self._prune(weights)
        source, config = self.prepared.request.source, self.prepared.request.config
        kvpress.serve(self._place())
        return Model(self._hf, self.prepared.tokenizer, name=source.text, attn=config.attn)

    def _place(self) -> kvpress.Place:
        """Where another process finds this model; one that is nowhere on disk is saved when it is asked for."""
        import torch

        prepared, source = self.prepared, self.prepared.request.source
        hub = source.kind == "hub"
        place = kvpress.Place(
            source.place if hub else str(Path(source.place).expanduser().resolve()),
            getattr(prepared.model_config, "_commit_hash", None) if hub else None,
            prepared.dtype, prepared.device, prepared.request.config.trust_remote_code, torch.get_num_threads(),
        )  # fmt: skip
        if source.kind == "random" or self.weights != DENSE:
            return kvpress.saved(self._hf, prepared.tokenizer, place)
        return place

    def _load(self) -> Any:
        prepared, request = self.prepared, self.prepared.request
        self.say(f"loading {request.source.text} ({prepared.dtype}, {prepared.device})")
        return loader.load_weights(
            prepared.model_config, request.source, prepared.dtype, prepared.device,
            trust_remote_code=request.config.trust_remote_code,
        )  # fmt: skip

    def _prune(self, weights: str) -> None:
        kind = next(w for w in self.prepared.request.weights if w.text == weights)
        assert kind.pruning is not None
        texts = self.prepared.calibration[weights]
        self.say(f"pruning: {weights}, calibrated on {len(texts)} texts, {sum(map(len, texts)):,} tokens")
        report = prune_model(self._hf, texts, kind.pruning, given=f"--weights {weights}", between=self._between)
        file = kind.calibration
        source = {"file": file.path, "sha": file.sha} if file else {"file": None, "sha": None}
        self.note(weights, {**report.facts(), "calibration": source, "seed": kind.pruning.seed})
        self.say(
            f"pruned: {100 * report.sparsity:.2f} % of {report.parameters:,} weights in {report.matrices} matrices"
        )

    def _between(self, done: int, layers: int) -> bool:
        """Says how far pruning is; True where it is to stop."""
        self.watch(f"pruning layer {done + 1} of {layers}")
        return self.stop()
