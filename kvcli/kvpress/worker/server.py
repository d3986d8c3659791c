"""Runs kvpress in its own environment and says which KV pairs a press keeps.

One JSON object per line: requests on stdin, answers on the stdout it was started with. What libraries print goes to
stderr. It ends as soon as its stdin closes.
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import os
import platform
import queue
import signal
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvcli.kvpress.worker import Refused
from kvcli.kvpress.worker.constructors import make, parameters, press_class
from kvcli.kvpress.worker.pairs import Seen, layers, prefill, unmasked, watched

PROTOCOL = 1
REMEMBERED = 1 << 30
"""Bytes of prefilled prompts held, so that the other ratios and presses of a prompt need no prefill of their own."""


def main() -> None:
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # its advice would hide the last line of a crash
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes stdin when it ends
    requests: queue.Queue[bytes] = queue.Queue()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    server = Server()
    while True:
        answer = server.answer(requests.get())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(stdin: Any, requests: queue.Queue[bytes]) -> None:
    """Hands requests on. Ends the process with the parent, also in the middle of a prefill."""
    try:
        for line in stdin:
            requests.put(line)
    finally:
        os._exit(0)


class Server:
    """One model at a time; presses are made once per description."""

    def __init__(self) -> None:
        self.model: Any = None
        self.presses: dict[str, Any] = {}
        self.prompts: OrderedDict[tuple[int, ...], list[Seen]] = OrderedDict()

    def answer(self, line: bytes) -> dict[str, Any]:
        request: dict[str, Any] = {}
        try:
            request = json.loads(line)
            handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
                "hello": self.hello, "describe": self.describe, "make": self.make, "load": self.load, "run": self.run,
            }  # fmt: skip
            return {"id": request["id"], "answer": handlers[request["do"]](request)}
        except Refused as e:
            return {"id": request.get("id"), "error": str(e)}
        except Exception as e:
            return {"id": request.get("id"), "error": _in_one_line(e)}

    def hello(self, request: dict[str, Any]) -> dict[str, Any]:
        """Versions, read without importing anything heavy."""
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str | None] = {"python": platform.python_version()}
        for name in ("kvpress", "transformers", "torch", "kvcli"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        return {"protocol": PROTOCOL, "versions": found}

    def describe(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a press's constructor takes."""
        return {"parameters": parameters(press_class(request["press"]))}

    def make(self, request: dict[str, Any]) -> dict[str, Any]:
        """Whether the press takes these arguments."""
        self._press(request["press"])
        return {}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """The model in eval mode."""
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        kvpress = importlib.import_module("kvpress")
        if request["threads"]:
            torch.set_num_threads(request["threads"])
        self.prompts.clear()
        self.presses.clear()  # some read the model when they are first used
        model = transformers.AutoModelForCausalLM.from_pretrained(
            request["model"], revision=request["revision"], dtype=getattr(torch, request["dtype"]),
            trust_remote_code=request["trust_remote_code"],
        )  # fmt: skip
        self.model = model.to(request["device"]).eval()
        return {"layers": len(layers(self.model)), "tested": isinstance(self.model, kvpress.SUPPORTED_MODELS)}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Kept positions per layer and KV head of one prompt.

        `ratio`: kvpress's compression_ratio; null for a press with a knob of its own. `attention`: eager for presses
        that read attention weights. `direct`: a prefill of its own even where a remembered one would do.
        """
        torch = importlib.import_module("torch")
        if self.model is None:
            raise Refused("no model was loaded")
        press, ids = self._press(request["press"]), request["ids"]
        if request["ratio"] is not None:
            press.compression_ratio = request["ratio"]
        torch.manual_seed(request["seed"])
        replay = request["attention"] == "sdpa" and _acts_in_hooks(press) and not request.get("direct")
        with self._attention(request["attention"]), torch.no_grad(), unmasked(self.model):
            kept = self._replayed(press, ids) if replay else self._direct(press, ids)
        counts = [[len(head) for head in layer] for layer in kept]
        flat = torch.cat([head for layer in kept for head in layer]).numpy().astype("<i4")
        return {"counts": counts, "positions": base64.b64encode(flat.tobytes()).decode("ascii")}

    def _press(self, description: dict[str, Any]) -> Any:
        key = json.dumps(description, sort_keys=True)
        if key not in self.presses:
            self.presses[key] = make(description)
        return self.presses[key]

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        before = self.model.config._attn_implementation
        if before != implementation:
            self.model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            if before != implementation:
                self.model.set_attn_implementation(before)

    def _direct(self, press: Any, ids: list[int]) -> list[Any]:
        """A prefill inside the press, as kvpress's pipeline does it."""
        with watched(self.model) as seen, press(self.model):
            cache = prefill(self.model, ids)
        kept = []
        for each in seen:
            layer = cache.layers[each.module.layer_idx]
            kept.append(each.kept(layer.keys, layer.values))
        return kept

    def _replayed(self, press: Any, ids: list[int]) -> list[Any]:
        """The press's own hooks on what its layers saw and returned in a prefill of this prompt.

        What such a press leaves in a layer's cache is read by no other layer before the prefill ends, so the prefill is
        the same for every press and ratio.
        """
        kept = []
        seen = self._remembered(ids)
        with press(self.model):
            for each in seen:
                layer = types.SimpleNamespace(keys=each.keys, values=each.values)
                if press.forward_hook in each.module._forward_hooks.values():
                    cache = types.SimpleNamespace(layers={each.module.layer_idx: layer})
                    press.forward_hook(each.module, (), {**each.kwargs, "past_key_values": cache}, [None, None])
                try:
                    kept.append(each.kept(layer.keys, layer.values))
                except Refused:
                    self.prompts.clear()  # what it changed may be shared
                    raise
        return kept

    def _remembered(self, ids: list[int]) -> list[Seen]:
        key = tuple(ids)
        if key in self.prompts:
            self.prompts.move_to_end(key)
            return self.prompts[key]
        with watched(self.model) as seen:
            prefill(self.model, ids)
        self.prompts[key] = seen
        while sum(each.bytes for prompt in self.prompts.values() for each in prompt) > REMEMBERED:
            self.prompts.popitem(last=False)
        return seen


def _acts_in_hooks(press: Any) -> bool:
    """Whether a press does all its work in the hooks of its layers."""
    base = importlib.import_module("kvpress").BasePress
    return type(press).__call__ is base.__call__


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
