"""Runs kvpress in its own environment and says which KV pairs a press keeps.

Started by path with another interpreter, imports nothing of kvcli. One JSON object per line: requests on stdin, answers
on the stdout it was started with. What libraries print goes to stderr. It ends as soon as its stdin closes.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import logging
import os
import platform
import queue
import signal
import sys
import threading
import types
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROTOCOL = 1
REMEMBERED = 1 << 30
"""Bytes of prefilled prompts held, so that the other ratios and presses of a prompt need no prefill of their own."""


class Refused(Exception):
    """A request that cannot be met; the message is for the user."""


def main() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]  # nothing beside this file is a module
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
        for name in ("kvpress", "transformers", "torch"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        return {"protocol": PROTOCOL, "versions": found}

    def describe(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a press's constructor takes."""
        return {"parameters": parameters(_press_class(request["press"]))}

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
        return {"layers": len(_layers(self.model)), "tested": isinstance(self.model, kvpress.SUPPORTED_MODELS)}

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
        with self._attention(request["attention"]), torch.no_grad(), _unmasked(self.model):
            kept = self._replayed(press, ids) if replay else self._direct(press, ids)
        counts = [[len(head) for head in layer] for layer in kept]
        flat = torch.cat([head for layer in kept for head in layer]).numpy().astype("<i4")
        return {"counts": counts, "positions": base64.b64encode(flat.tobytes()).decode("ascii")}

    def _press(self, description: dict[str, Any]) -> Any:
        key = json.dumps(description, sort_keys=True)
        if key not in self.presses:
            self.presses[key] = _make(description)
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
        with _watched(self.model) as seen, press(self.model):
            cache = _prefill(self.model, ids)
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
        with _watched(self.model) as seen:
            _prefill(self.model, ids)
        self.prompts[key] = seen
        while sum(each.bytes for prompt in self.prompts.values() for each in prompt) > REMEMBERED:
            self.prompts.popitem(last=False)
        return seen


@dataclass
class Seen:
    """What one attention layer was given in a prefill, and the keys and values [1, H_kv, n, D] it wrote."""

    module: Any
    kwargs: dict[str, Any]
    keys: Any
    values: Any
    versions: tuple[int, int]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.kwargs["hidden_states"]))

    def kept(self, keys: Any, values: Any) -> list[Any]:
        """Per KV head the positions, ascending, of the pairs a press left. Raises Refused where these are not the
        prompt's own pairs."""
        name = f"layer {self.module.layer_idx}"
        if (self.keys._version, self.values._version) != self.versions:
            raise Refused(f"{name}: the press writes into the prompt's keys or values; kvcli takes only what it keeps")
        masked = getattr(self.module, "masked_key_indices", None)
        if masked is not None:
            if keys.shape != self.keys.shape:
                raise Refused(f"{name}: the press both masks and evicts")
            return _not_masked(masked, self.keys.shape)
        return positions(self.keys[0], self.values[0], keys[0], values[0], name)


def _prefill(model: Any, ids: list[int]) -> Any:
    """kvpress's own call, without the output layer."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    cache = transformers.DynamicCache()
    model.model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
    return cache


@contextmanager
def _watched(model: Any) -> Iterator[list[Seen]]:
    """Notes the first call of every attention layer, before any hook of a press acts on it."""
    seen: list[Seen] = []
    done: set[int] = set()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.layer_idx in done:
            return
        done.add(module.layer_idx)
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        rest = {k: v for k, v in kwargs.items() if k != "past_key_values"}
        versions = (layer.keys._version, layer.values._version)
        seen.append(Seen(module, rest, layer.keys, layer.values, versions))

    hooks = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in _layers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _unmasked(model: Any) -> Iterator[None]:
    """No mask of an earlier prompt or press is left in a layer."""

    def clear() -> None:
        for layer in _layers(model):
            layer.self_attn.masked_key_indices = None

    clear()
    try:
        yield
    finally:
        clear()


def _layers(model: Any) -> Any:
    inner = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return inner.layers


def _acts_in_hooks(press: Any) -> bool:
    """Whether a press does all its work in the hooks of its layers."""
    base = importlib.import_module("kvpress").BasePress
    return type(press).__call__ is base.__call__


def _not_masked(masked: Any, shape: Any) -> list[Any]:
    """Positions per head that kvpress's fake keys do not hide. masked: (batch, head, position) of each hidden pair."""
    torch = importlib.import_module("torch")
    stays = torch.ones(shape[1], shape[2], dtype=torch.bool)
    stays[masked[1].cpu(), masked[2].cpu()] = False
    return [head.nonzero()[:, 0] for head in stays]


def positions(keys: Any, values: Any, kept_keys: Any, kept_values: Any, name: str) -> list[Any]:
    """Where the kept rows stand among the prompt's, per head, ascending; compared bit by bit.

    keys, values [H, n, D]; kept ones [H, K, D], in any order. Of equal pairs (key and value) the first are taken.
    Raises Refused for a kept pair that is none of the prompt's.
    """
    torch = importlib.import_module("torch")
    heads, n = keys.shape[:2]
    if kept_keys.shape == keys.shape and torch.equal(kept_keys, keys) and torch.equal(kept_values, values):
        return [torch.arange(n)] * heads
    if kept_keys.shape[0] != heads or kept_keys.shape[1] > n or kept_keys.shape[:2] != kept_values.shape[:2]:
        raise Refused(f"{name}: the press returns {kept_keys.shape[1]} pairs for a prompt of {n}")
    dense, rest = _bits(keys, values), _bits(kept_keys, kept_values)
    ranks = torch.randint(-(2**62), 2**62, (dense.shape[-1],), generator=torch.Generator().manual_seed(0))
    ranks = ranks.to(dense.device) | 1
    marks, order = (dense * ranks).sum(-1).sort(dim=-1, stable=True)
    mine, which = (rest * ranks).sum(-1).sort(dim=-1, stable=True)
    again = torch.arange(mine.shape[1], device=mine.device) - torch.searchsorted(mine, mine)
    at = (torch.searchsorted(marks, mine) + again).clamp(max=n - 1)
    found = order.gather(1, at)
    width = dense.shape[-1]
    theirs = dense.gather(1, found.unsqueeze(-1).expand(-1, -1, width))
    ours = rest.gather(1, which.unsqueeze(-1).expand(-1, -1, width))
    if not torch.equal(theirs, ours):
        raise Refused(
            f"{name}: the press returns keys or values that are not the prompt's; kvcli takes only what it keeps"
        )
    return list(found.sort(-1).values.cpu())


def _bits(keys: Any, values: Any) -> Any:
    """[H, n, D_k + D_v] int64: the bits of each pair."""
    torch = importlib.import_module("torch")
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]
    return torch.cat([t.detach().contiguous().view(whole) for t in (keys, values)], -1).long()


def _press_class(name: str) -> Any:
    kvpress = importlib.import_module("kvpress")
    cls = getattr(kvpress, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, kvpress.BasePress)):
        raise Refused(f"kvpress has no press '{name}'")
    return cls


def _make(description: dict[str, Any]) -> Any:
    """A press from {'class': name, 'arguments': {...}}; an argument may be another press."""
    arguments = {
        key: _make(value) if isinstance(value, dict) else value for key, value in description["arguments"].items()
    }
    return _press_class(description["class"])(**arguments)


def parameters(cls: Any) -> list[dict[str, Any]]:
    """Name, kind, default and choices of what a user may set. The compression ratio is not among them: it is asked for
    with every prompt."""
    found = []
    hints = _hints(cls)
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name.startswith("_") or name == "compression_ratio":
            continue
        kind, choices, optional = _kind(hints.get(name, parameter.annotation))
        default = parameter.default
        required = default is parameter.empty or (kind == "press" and default is None)
        plain = default if isinstance(default, (bool, int, float, str)) else None
        found.append(
            {"name": name, "kind": kind, "default": plain, "required": required, "choices": choices,
             "optional": optional or (default is None and not required)}
        )  # fmt: skip
    return found


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except Exception:
        return {}


def _kind(annotation: Any) -> tuple[str, list[str] | None, bool]:
    """(kind, choices, whether None is a value): bool, int, float, str, floats, press, or other."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "str", [str(value) for value in inside], False
    if origin in (typing.Union, types.UnionType):
        kinds = {_kind(a)[:1] for a in inside if a is not type(None)}
        first = next((a for a in inside if a is not type(None)), None)
        kind, choices, _ = _kind(first)
        return (kind if len(kinds) == 1 else "other"), choices, type(None) in inside
    if origin is list and inside == (float,):
        return "floats", None, False
    if annotation in (bool, int, float, str):
        return annotation.__name__, None, False
    base = importlib.import_module("kvpress").BasePress
    if inspect.isclass(annotation) and issubclass(annotation, base):
        return "press", None, False
    return "other", None, False


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
