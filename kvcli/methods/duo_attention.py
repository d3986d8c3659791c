"""DuoAttention: heads that retrieve keep everything, the others their first and newest tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods._heads import gates_need, kv_scores, profile_need
from kvcli.methods.base import Domain, Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


@dataclass(frozen=True)
class DuoAttention(Method):
    """Retrieval heads keep all tokens, streaming heads `sinks` first and `recent` newest ones.

    As many heads retrieve as the budget of the model holds, the ones with the largest scores (of equal ones the first
    by layer and head). `heads=file` takes trained gates, `profile=` naming the authors' full_attention_heads.tsv or its
    folder; `heads=optimise` takes those that `kvcli profile-heads --gates` trained on this model; `heads=probe` takes a
    file of `kvcli profile-heads`. Below (sinks + recent) / n all heads stream: flags `unreachable` and `over_budget`,
    and the note `nearest_ratio`. While generating, streaming heads go on sliding and retrieval heads keep every new
    token: `--decode-ratio` only switches that on. With `prefill=streaming` streaming heads also read the prompt through
    that window, a query's own token among the newest, and the answer's first token comes from that prefill.

    Source: arXiv:2410.10819, section 2, and the authors' code (mit-han-lab/duo-attention, duo_attn/utils.py), where a
    quantile of the gates divides the heads. Differs: `heads=probe` is kvcli's own (note `heads`): attention to a needle
    finds the heads, while the authors train a gate for each by distillation on pass keys, for they find that attention
    alone does not show what a head does to the output. With `prefill=dense` the prompt is read densely by all heads, as
    in the authors' first pass over it, but in their evaluation the prompt's last 50 tokens are already read by
    streaming heads; where they read in chunks, a streaming head sees all of its chunk, not its window alone. Sinks and
    recent tokens are never cut: what does not fit the budget is flagged. All six files of the authors were trained with
    128 sinks and 256 recent tokens (`sinks=128`); their script for LongBench reads with 64, the default here.
    """

    name = "duo_attention"
    title = "DuoAttention"
    paper = "arXiv:2410.10819"
    tier = 2
    phases = ("prefill", "decode")
    budget_scope = "model"
    protects = "first and newest tokens of every head; all tokens of retrieval heads"
    domain = Domain(floor="(sinks + recent) / n")
    decoding = "own"
    decode_reads = False
    open_points = (
        (
            "how many heads retrieve at a kept ratio (the paper gives shares of heads: 25 or 50 % of them)",
            "as many as fit beside the other heads' sinks and recent tokens; below (sinks + recent) / n none, flagged",
        ),
        (
            "a prompt no longer than sinks + recent",
            "all of it stays, flagged; all heads slide while generating, unless everything was asked for",
        ),
    )

    heads: str = setting(
        "probe",
        choices=("probe", "file", "optimise"),
        help="where the heads' scores come from",
        paper="trained gates (file, optimise)",
    )
    sinks: int = setting(
        64,
        ge=0,
        help="first tokens of a streaming head",
        paper="64 in its LongBench script, 128 in all its trained files",
    )
    recent: int = setting(256, ge=1, help="newest tokens of a streaming head", paper="256")
    reduce: str = setting("mean", choices=("mean", "max"), help="a KV head's score from its query heads'")
    profile: str = setting("", help="file with the scores; of heads=probe the model's own is the default")
    prefill: str = setting(
        "dense",
        choices=("dense", "streaming"),
        help="how streaming heads read the prompt; streaming is a prefill of its own",
        paper="dense, but for its end; in chunks",
    )

    def __post_init__(self) -> None:
        given = f"--method duo_attention:heads={self.heads}"
        if self.heads == "optimise" and self.profile:
            fix = f"heads=file,profile={self.profile}"
            raise KvcliError("heads=optimise finds its file by itself", given=f"{given},profile=...", fix=fix)
        if self.heads == "file" and not self.profile:
            fix = "heads=file,profile=FOLDER with full_attention_heads.tsv, or heads=optimise"
            raise KvcliError("heads=file needs the file", given=given, fix=fix)

        if self.prefill == "streaming":  # on the instance: the class has its own, for its card
            object.__setattr__(self, "kind", "in-prefill")
            object.__setattr__(self, "sharing", 3)

    def prefill_window(self) -> tuple[int, int] | None:
        return (self.sinks, self.recent) if self.prefill == "streaming" else None

    def _need(self) -> str:
        return gates_need(self.sinks, self.recent) if self.heads == "optimise" else profile_need(self.profile)

    def needs(self) -> frozenset[str]:
        return frozenset({self._need()})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        n, count = ctx.n, ctx.layers * ctx.kv_heads
        profile = ctx.extra(self._need())
        self._check_kind(profile)
        scores = [x for row in kv_scores(profile, ctx, self.reduce) for x in row]
        sinks = min(self.sinks, n - min(self.recent, n))
        stream = torch.cat([torch.arange(sinks), torch.arange(n - min(self.recent, n), n)])
        spare, whole = budget.model_total - count * len(stream), torch.arange(n)
        fit = max(0, spare // (n - len(stream))) if len(stream) < n else 0
        retrieving = count if budget.everything else fit
        order = sorted(range(count), key=lambda i: (-scores[i], i))
        chosen = set(order[:retrieving])
        rows = [range(layer * ctx.kv_heads, (layer + 1) * ctx.kv_heads) for layer in range(ctx.layers)]
        kept = [[whole if i in chosen else stream for i in row] for row in rows]
        facts = [{"streams": torch.tensor([i not in chosen for i in row])} for row in rows]
        notes: dict[str, Any] = {
            "heads": self.heads, "profile": profile.digest, "retrieval_heads": retrieving, "of": count,
        }  # fmt: skip
        if spare >= 0:
            return Selection(kept, notes=notes, facts=facts)
        notes["nearest_ratio"] = math.ceil(1e4 * len(stream) / n) / 1e4
        return Selection(kept, frozenset({"unreachable", "over_budget"}), notes=notes, facts=facts)

    def decode_leaves(self, view: Generating) -> Tensor:
        """What a streaming head's window has left behind."""
        behind = (view.position >= self.sinks) & (view.position <= view.newest - self.recent)
        return behind & view.facts["streams"][..., None]

    def _check_kind(self, profile: Any) -> None:
        """A probe's scores under `heads=file`, or gates under `heads=probe`, would be recorded under a wrong name."""
        found, wanted = "file" if profile.per == "kv" else "probe", "probe" if self.heads == "probe" else "file"
        if found != wanted:
            held = "trained gates" if found == "file" else "scores of kvcli profile-heads"
            what = f"{self.profile or 'the head profile'} holds {held}"
            raise KvcliError(what, given=f"--method duo_attention:heads={self.heads}", fix=f"heads={found}")
        trained = (profile.how.get("sinks", self.sinks), profile.how.get("recent", self.recent))
        if found == "file" and trained != (self.sinks, self.recent):
            what = f"{self.profile} was trained with {trained[0]} sinks and {trained[1]} recent tokens"
            given = f"--method duo_attention:heads=file,sinks={self.sinks},recent={self.recent}"
            raise KvcliError(what, given=given, fix=f"sinks={trained[0]},recent={trained[1]}")
