"""kvcli as a model of lm-evaluation-harness: `--model kvcli`. Importing this module registers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvcli.config import SweepConfig
from kvcli.errors import KvcliError
from kvcli.evals.harness import package
from kvcli.evals.harness.tasks import MAX_GEN_TOKS, generation_length
from kvcli.harness.asking import Engine
from kvcli.harness.requests import DELIMITER, settings_text
from kvcli.models.source import RANDOM_SETTINGS, parse_model

with package.supported():
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

PLAIN = {f.name for f in dataclasses.fields(SweepConfig)} & {
    "tokenizer", "dtype", "attn", "threads", "trust_remote_code", "strict_window", "decode_interval", "cap",
    "max_prompt_tokens", "truncate", "memory", "kvpress_python",
}  # fmt: skip
"""Settings of a run that are model_args of the same name."""
SINGLE = {
    "ratio": "ratios", "budget": "budgets", "first_token": "first_token", "seed": "seeds", "query": "query",
    "decode_ratio": "decode_ratios", "decode_budget": "decode_budgets",
}  # fmt: skip
"""Axes of a sweep, of which a model has one value."""


@register_model("kvcli")
class KvcliLM(LM):  # type: ignore[misc, unused-ignore]
    """A model whose answers come from a compressed cache.

    model_args: pretrained (as --model), method (as --method; its settings may follow as arguments of their own), ratio
    or budget, and first_token, query, seed, decode_ratio, decode_budget, tokenizer, dtype, truncate, ... as the options
    of `kvcli run`. delimiter: what ends the context of a prompt. greedy: whether log-likelihood requests are also
    answered greedily, which `acc` of loglikelihood tasks and `exact_match` of choices ask for.
    """

    def __init__(
        self,
        pretrained: str = "testbed",
        method: str = "full",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        delimiter: str = DELIMITER,
        greedy: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        given = parse_model(pretrained).settings  # of `random:FOLDER:layers=2,hidden=64` lm-eval leaves the first size
        sizes = [f"{key}={settings.pop(key)}" for key in RANDOM_SETTINGS if given and key in settings]
        pretrained = ",".join([pretrained, *sizes])
        values: dict[str, Any] = {name: settings.pop(name) for name in PLAIN if name in settings}
        values |= {SINGLE[name]: [settings.pop(name)] for name in SINGLE if name in settings}
        if str(batch_size).isdigit() and int(str(batch_size)) > 1:  # 1 is lm-eval's default, `auto` is kvcli's own way
            values["prefill_batch"] = int(str(batch_size))
        method = settings_text(method, settings)
        values |= {"model": pretrained, "methods": [method], "device": device or "auto", "full": False}
        values |= {"template": "raw", "fidelity": False}
        self.engine = Engine(SweepConfig.from_dict(values, given="--model_args"), delimiter)
        self.greedy = greedy

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def max_length(self) -> int:
        """The model's context, as lm-eval's tasks may ask for it."""
        return self.engine.context or 2048

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.tokenizer.chat_template or "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's Hugging Face model does it; what it gives is tokenised with no second BOS."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"kvcli": self.engine.facts()}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop text, those of one kind of `gen_kwargs` together."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(_kind(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        for (length, until, temperature, top_p), members in kinds.items():
            texts = self.engine.generate([requests[i].args[0] for i in members], length, until, temperature, top_p)
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request the continuation's log-likelihood behind the compressed cache, and whether it is the greedy one.

        Requests of one context share its cache.
        """
        contexts: dict[str, dict[str, list[int]]] = {}
        for i, request in enumerate(requests):
            context, continuation = request.args
            contexts.setdefault(context, {}).setdefault(continuation, []).append(i)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        found = self.engine.loglikelihoods({c: list(options) for c, options in contexts.items()}, self.greedy)
        for context, options in contexts.items():
            for continuation, result in zip(options, found[context], strict=True):
                for i in options[continuation]:
                    results[i] = result
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: the likelihood of a whole text has no prompt that could be compressed before it."""
        what = "loglikelihood_rolling measures the perplexity of whole texts: there is no prompt to compress"
        raise KvcliError(what, given="--model kvcli", fix="tasks of lm-eval's kinds generate_until or multiple_choice")


def _kind(arguments: dict[str, Any]) -> tuple[int, tuple[str, ...], float, float]:
    """Length, stop texts, temperature and top_p of `gen_kwargs`, read as `normalize_gen_kwargs` of lm-eval's
    `models/utils.py` reads them. Raises KvcliError for ways of decoding that kvcli does not have."""
    until = arguments.get("until") or []
    temperature = float(arguments.get("temperature") or 0.0)
    drawn = arguments.get("do_sample", temperature > 0)
    known = {"until", "temperature", "do_sample", "top_p", "max_gen_toks", "max_new_tokens", "max_tokens"}
    strange = {k: v for k, v in arguments.items() if k not in known | {"max_completion_tokens", "num_beams"}}
    if strange or arguments.get("num_beams", 1) != 1:
        text = ", ".join(f"{k}={v}" for k, v in (strange or {"num_beams": arguments["num_beams"]}).items())
        raise KvcliError(
            f"kvcli does not generate with {text}", given="gen_kwargs", fix="greedy, or temperature and top_p"
        )
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    top_p = float(arguments.get("top_p") or 1.0)
    return generation_length(arguments) or MAX_GEN_TOKS, stops, temperature if drawn else 0.0, top_p if drawn else 1.0
