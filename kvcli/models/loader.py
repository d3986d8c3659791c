"""Model names to weights and tokenizer, with every check that can be made before weights are read."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli import hub
from kvcli.errors import Exit, KvcliError
from kvcli.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


@contextmanager
def _loading(what: str, source: ModelSource, given: str) -> Iterator[None]:
    """Turns a hub that is away, an unknown id, a gated repository and a broken folder into one line, within seconds.

    A hub that is away is no error where an earlier download is in the local cache.
    """
    reason = _hub_is_away(source.place, source.revision) if source.kind == "hub" else ""
    try:
        with hub.offline() if reason else nullcontext():
            yield
    except KvcliError:
        raise
    except (OSError, ValueError) as e:
        text = f"{type(e).__name__} {e}"
        if "gated" in text.lower():
            fix = "accept the licence on the model's page, then: hf auth login"
            raise KvcliError(f"{what} needs a licence", given=given, fix=fix) from e
        if reason:
            fix = "check the network; offline: --model ./FOLDER or --model testbed"
            raise KvcliError(f"the hub cannot be reached for {what}: {reason}", given=given, fix=fix) from e
        fix = "check the name" if source.kind == "hub" else "a folder written by save_pretrained, with its weights"
        raise KvcliError(f"{what} cannot be loaded: {_first_line(e)}", given=given, fix=fix) from e


@cache
def _hub_is_away(place: str, revision: str | None) -> str:
    return hub.unreachable("model", place, revision)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config; sizes of a `random:` model are written into it."""
    with _loading(f"model {source.place}", source, f"--model {source.text}"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.place, revision=source.revision, trust_remote_code=trust_remote_code)
    return config


def load_tokenizer(
    source: ModelSource, name: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one of --tokenizer."""
    place, given = (name, f"--tokenizer {name}") if name else (source.place, f"--model {source.text}")
    if name and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise KvcliError(f"no tokenizer folder {name}", given=given, fix="a folder with tokenizer files")
    if not name and source.kind in ("random", "folder") and not _has_tokenizer(Path(place)):
        raise KvcliError(f"no tokenizer files in {place}", given=given, fix="--tokenizer FOLDER")
    with _loading(f"tokenizer {place}", tokenizer_source(source, name), given):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(Path(place).expanduser()) if name and name.startswith("~") else place,
            revision=None if name else source.revision,
            trust_remote_code=trust_remote_code,
        )


def tokenizer_source(source: ModelSource, name: str | None) -> ModelSource:
    """Where the tokenizer comes from: the model's place, a folder or another hub id."""
    if name is None:
        return source
    is_folder = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return ModelSource(name, "folder" if is_folder else "hub", name)


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    )


@contextmanager
def _family(config: Any, source: ModelSource) -> Iterator[None]:
    """A config that lacks what kvcli reads of every decoder is of a family it does not support."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as e:
        family = getattr(config, "model_type", type(config).__name__)
        what = f"models of family '{family}' are not supported: {_first_line(e)}"
        fix = "a family of plain causal attention: llama, mistral, qwen2, qwen3, phi3, gpt_neox, gpt2, opt, ..."
        raise KvcliError(what, given=f"--model {source.text}", fix=fix) from e


def resize(config: Any, source: ModelSource, vocabulary: int) -> None:
    """Writes a random model's sizes into its config. vocabulary: the tokenizer's, for vocab=auto."""
    with _family(config, source):
        _resize(config, source, vocabulary)


def _resize(config: Any, source: ModelSource, vocabulary: int) -> None:
    sizes = dict(source.settings)
    sizes.pop("seed", None)
    given = f"--model {source.text}"
    wanted = sizes.pop("vocab", "auto")
    values = {key: int(value) for key, value in sizes.items()}
    config.vocab_size = max(vocabulary, 1) if wanted == "auto" else int(wanted)
    if config.vocab_size < vocabulary:
        fix = f"vocab={vocabulary} or vocab=auto"
        raise KvcliError(f"vocab={wanted} is smaller than the tokenizer's {vocabulary}", given=given, fix=fix)
    names = {
        "layers": ("num_hidden_layers", "n_layer"), "hidden": ("hidden_size", "n_embd"),
        "heads": ("num_attention_heads", "n_head"), "kv_heads": ("num_key_value_heads",),
        "positions": ("max_position_embeddings", "n_positions"),
    }  # fmt: skip
    old_hidden, old_heads = config.hidden_size, config.num_attention_heads
    for key, value in values.items():
        attribute = next((a for a in names[key] if a in config.to_dict() or a in config.attribute_map), None)
        if attribute is None:
            raise KvcliError(f"{config.model_type} has no size '{key}'", given=given, fix=f"leave {key} out")
        setattr(config, attribute, value)
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if kv_heads > heads and "kv_heads" not in values:
        kv_heads = config.num_key_value_heads = heads
    if hidden % heads or heads % kv_heads:
        fix = "hidden divisible by heads, heads by kv_heads"
        raise KvcliError(f"hidden={hidden}, heads={heads}, kv_heads={kv_heads} do not fit", given=given, fix=fix)
    if hidden != old_hidden or heads != old_heads:
        if getattr(config, "head_dim", None):
            config.head_dim = hidden // heads
        if getattr(config, "intermediate_size", None):
            config.intermediate_size = max(8, round(config.intermediate_size * hidden / old_hidden / 8) * 8)
    if getattr(config, "layer_types", None):
        kinds = config.layer_types
        config.layer_types = [kinds[i % len(kinds)] for i in range(config.num_hidden_layers)]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, key, None)
        if isinstance(token, int) and token >= config.vocab_size:
            setattr(config, key, None)


def available_memory() -> int | None:
    """Bytes a new process may still take on this machine; None where it cannot be told."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def check_size(config: Any, source: ModelSource, bytes_per_weight: int, device: str, *, trust: bool = False) -> int:
    """Number of parameters; refuses a model that does not fit into memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _family(config, source):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=trust).parameters())
    if device.startswith("cuda"):
        free: int | None = torch.cuda.mem_get_info(torch.device(device))[0]
    else:
        free = available_memory()
    if free is not None and count * bytes_per_weight > free:
        size, room = count * bytes_per_weight / 2**30, free / 2**30
        what = f"the model's weights take {size:.1f} GiB, {room:.1f} GiB are free on {device}"
        fix = "a smaller size (layers=2,hidden=64), --dtype bfloat16, or another device"
        raise KvcliError(what, given=f"--model {source.text}", fix=fix)
    return count


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KvcliError(f"unknown device '{name}'", given=f"--device {name}", fix="cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KvcliError("no CUDA device on this machine", given=f"--device {name}", fix="--device cpu")
    return name


def pick_dtype(name: str, device: str, config: Any) -> str:
    """'auto': float32 on a CPU, else what the weights were published in."""
    if name != "auto":
        return name
    if device == "cpu":
        return "float32"
    return str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")


def check_attention(attn: str, device: str, dtype: str) -> None:
    """Raises KvcliError where --attn flash cannot work."""
    from importlib.util import find_spec

    if attn == "flash" and find_spec("flash_attn") is None:
        raise KvcliError(
            "flash-attn is not installed", given="--attn flash", fix="pip install 'kvcli[flash]', or --attn auto"
        )
    if attn == "flash" and not device.startswith("cuda"):
        raise KvcliError("flash-attn needs a CUDA device", given=f"--attn flash --device {device}", fix="--attn auto")
    if attn == "flash" and dtype not in ("float16", "bfloat16"):
        given = f"--attn flash --dtype {dtype}"
        raise KvcliError("flash-attn takes 16-bit numbers", given=given, fix="--dtype bfloat16")


def load_weights(config: Any, source: ModelSource, dtype: str, device: str, *, trust_remote_code: bool = False) -> Any:
    """The model in eval mode. Random models take their weights from the `seed` setting."""
    import torch
    from transformers import AutoModelForCausalLM

    check_size(config, source, getattr(torch, dtype).itemsize, device, trust=trust_remote_code)
    if source.kind == "random":
        state = torch.random.get_rng_state()
        torch.manual_seed(int(source.settings.get("seed", "0")))
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        torch.random.set_rng_state(state)
        return model.to(device=device, dtype=getattr(torch, dtype)).eval()
    with _loading(f"model {source.place}", source, f"--model {source.text}"):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.place, config=config, revision=source.revision, dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        except torch.OutOfMemoryError as e:
            raise KvcliError(
                "out of memory while loading", given=f"--model {source.text}", code=Exit.ENVIRONMENT
            ) from e
    return model.to(device).eval()
