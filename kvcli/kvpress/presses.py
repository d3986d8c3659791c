"""The presses of kvpress 0.5.5: which can be measured as methods, how their budgets bind, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kvcli.errors import KvcliError, unknown

PREFIX = "kvpress:"
VERSION = "0.5.5"
"""What the table below was read from. Another version may have other presses, arguments and roundings."""


@dataclass(frozen=True)
class Press:
    """What kvcli must know of a press beyond its constructor.

    scope: where its budget binds. counts: how its ratio becomes a number of pairs (kvcli.kvpress.shares). knob: it has
    no ratio, the named argument decides. attention: the implementation it needs. refused: why it cannot be measured,
    empty where it can.
    """

    scope: Literal["head", "layer", "model"] = "head"
    counts: Literal["kept", "removed"] = "kept"
    knob: str = ""
    attention: Literal["sdpa", "eager"] = "sdpa"
    random: str = ""
    """'always', or the argument that makes it random: `name` (when true) or `name=None` (when unset)."""
    keeps_last: bool = False
    """Whether no budget makes it evict the last token it sees."""
    any_attention: bool = True
    """Whether a press inside it may need attention weights."""
    refused: str = ""


_REROTATES = "it moves keys to other positions, and no kept position says where"
_DECODES = "it acts while tokens are generated, which kvcli does itself"
_ABSTRACT = "it is a base class"

PRESSES: dict[str, Press] = {
    "AdaKVPress": Press("layer", any_attention=False),
    "BasePress": Press(refused=_ABSTRACT),
    "BlockPress": Press(any_attention=False),
    "CAMPress": Press(refused=_DECODES),
    "CURPress": Press(random="use_random_leverage"),
    "CapPress": Press(),
    "ChunkKVPress": Press(any_attention=False),
    "ChunkPress": Press(any_attention=False),
    "CompactorPress": Press(random="always"),
    "ComposedPress": Press(refused="it chains presses with ratios of their own; give one press"),
    "CompressionRatioDecodingPress": Press(refused=_DECODES),
    "CriticalAdaKVPress": Press("layer", any_attention=False),
    "CriticalKVPress": Press(),
    "DMSPress": Press("model", knob="threshold", any_attention=False),
    "DecodingPress": Press(refused=_DECODES),
    "DuoAttentionPress": Press("model", knob="head_compression_ratio"),
    "EntropyGatedChunkKVPress": Press(any_attention=False),
    "ExpectedAttentionPress": Press(),
    "ExpectedAttentionStatsPress": Press(),
    "FastKVzipPress": Press("model", counts="removed"),
    "FinchPress": Press(refused="it needs a delimiter token in the prompt, and " + _REROTATES),
    "KVComposePress": Press("model"),
    "KVgradPress": Press("model", counts="removed"),
    "KVzapPress": Press(),
    "KVzipPress": Press("model", counts="removed"),
    "KeyDiffPress": Press(),
    "KeyRerotationPress": Press(refused=_REROTATES),
    "KnormPress": Press(),
    "LUKVPress": Press("model", any_attention=False),
    "LagKVPress": Press(),
    "LeverageScorePress": Press(random="always"),
    "MergingPress": Press(refused="it writes what it evicts into the values it keeps; kvcli's own: METHOD+merge"),
    "NonCausalAttnPress": Press(),
    "ObservedAttentionPress": Press(attention="eager"),
    "PerLayerCompressionPress": Press("model", knob="compression_ratios"),
    "PrefillDecodingPress": Press(refused=_DECODES),
    "PyramidKVPress": Press("model", counts="removed"),
    "QFilterPress": Press(),
    "RandomPress": Press(random="seed=None"),
    "RestoreKVPress": Press(refused="it adds trained KV pairs that are not the prompt's"),
    "ScorerPress": Press(refused=_ABSTRACT),
    "SimLayerKVPress": Press("model", knob="lazy_threshold"),
    "SnapKVPress": Press(),
    "StreamingLLMPress": Press(),
    "TOVAPress": Press(keeps_last=True),
    "ThinKPress": Press(refused="it zeroes channels of keys and evicts no pair; kvcli's own: think"),
}


def find(name: str, given: str) -> Press:
    """Raises KvcliError for a press that kvpress does not have or kvcli does not measure."""
    if name not in PRESSES:
        raise unknown("press", name, PRESSES, given=given, listing="docs/kvpress.md")
    press = PRESSES[name]
    if press.refused:
        raise KvcliError(f"{name} cannot be measured: {press.refused}", given=given, fix="docs/kvpress.md lists others")
    return press


@dataclass(frozen=True)
class Description:
    """A press with its arguments. typed: those a user gave; arguments: all that can be said of them, defaults included;
    inner: presses that are arguments, by name."""

    name: str
    typed: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Description] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def facts(self) -> Press:
        return PRESSES[self.name]

    def tree(self) -> Iterator[Description]:
        """This press and all inside it."""
        yield self
        for press in self.inner.values():
            yield from press.tree()

    def to_json(self) -> dict[str, Any]:
        """What the worker makes a press from."""
        inner = {key: press.to_json() for key, press in self.inner.items()}
        return {"class": self.name, "arguments": {**self.typed, **inner}}

    def flat(self, which: Literal["typed", "arguments"]) -> dict[str, Any]:
        """Arguments by dotted name; a press by its class."""
        found: dict[str, Any] = dict(getattr(self, which))
        for key, press in self.inner.items():
            found[key] = press.name
            found.update({f"{key}.{k}": v for k, v in press.flat(which).items()})
        return found

    @property
    def attention(self) -> str:
        return "eager" if any(press.facts.attention == "eager" for press in self.tree()) else "sdpa"

    @property
    def random(self) -> bool:
        """Whether chance decides, so that the cells of other seeds differ."""
        return any(press._random() for press in self.tree())

    def _random(self) -> bool:
        argument, _, value = self.facts.random.partition("=")
        if value == "None":
            return self.arguments.get(argument) is None
        return argument == "always" or bool(self.arguments.get(argument))

    @property
    def scope(self) -> str:
        """Where the budget binds; kvpress's `layerwise` moves it."""
        return "layer" if self.arguments.get("layerwise") else self.facts.scope
