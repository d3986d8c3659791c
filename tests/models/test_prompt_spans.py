"""Spans of every task's prompts on every tokenizer and template, on real rows, by round trip."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator

import pytest

from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample
from kvcli.models.prompt import Prompt
from tests.models.golden.cases import prompts, samples, task_params
from tests.models.golden.views import REAL, TASK_VIEWS, View

each = pytest.mark.parametrize("task", task_params())
on = pytest.mark.parametrize("files", REAL)


def cases(task: str, files: str) -> Iterator[tuple[View, Sample, Prompt]]:
    """A task's first samples and their prompts in all views of a tokenizer."""
    drawn = samples(task, files)
    assert drawn
    for view in (view for view in TASK_VIEWS if view.files == files):
        built = prompts(task, view)
        assert len(built) == len(drawn)
        yield from ((view, sample, prompt) for sample, prompt in zip(drawn, built, strict=True))


def region_texts(prompt: Prompt) -> dict[str, str]:
    """The prompt's own text of each region, joined where it stands in several places."""
    texts: dict[str, str] = defaultdict(str)
    for region in prompt.regions:
        texts[region.label] += prompt.span_text((region.start, region.end))
    return texts


def segment_texts(sample: Sample) -> dict[str, str]:
    texts: dict[str, str] = defaultdict(str)
    for segment in sample.segments:
        texts[f"shot {segment.shot}" if segment.region == "shot" else segment.region] += segment.text
    return texts


def inked(text: str) -> str:
    """Without white space: a blank between two regions belongs to the one whose token holds it."""
    return "".join(text.split())


def composed(text: str) -> str:
    """Qwen's tokenizers compose characters (NFC) before anything else, so that only composed texts come back."""
    return unicodedata.normalize("NFC", inked(text))


def runs(labels: list[str]) -> list[str]:
    """Labels with repeats in a row taken once."""
    return [label for i, label in enumerate(labels) if i == 0 or labels[i - 1] != label]


@on
@each
def test_regions_of_real_prompts(task: str, files: str) -> None:
    for view, sample, prompt in cases(task, files):
        covers_all_tokens(prompt)
        one_bos(prompt, view)
        found = region_texts(prompt)
        for label, text in segment_texts(sample).items():
            assert inked(found[label]) == inked(text), f"{view.name} {sample.id} {label}"
        shots_stand_where_the_task_put_them(sample, prompt)
        ends_with_its_question(sample, prompt)
        options_can_be_told_apart(sample, prompt)


@on
@each
def test_tokens_of_shots_decode_to_their_text(task: str, files: str) -> None:
    for view, sample, prompt in cases(task, files):
        decoded: dict[str, str] = defaultdict(str)
        for region in prompt.regions:
            ids = prompt.ids[region.start : region.end]
            decoded[region.label] += view.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        shots = {label: text for label, text in segment_texts(sample).items() if label.startswith("shot")}
        assert shots or not load_task(task).shots
        for label, text in shots.items():
            assert composed(decoded[label]) == composed(text), f"{view.name} {sample.id} {label}"


def covers_all_tokens(prompt: Prompt) -> None:
    edges = [region.start for region in prompt.regions] + [len(prompt.ids)]
    assert edges[0] == 0 and all(r.end == edge > r.start for r, edge in zip(prompt.regions, edges[1:], strict=True))
    assert len(prompt.offsets) == len(prompt.ids) and prompt.offsets == sorted(prompt.offsets)
    assert not prompt.text[prompt.offsets[-1] :].strip(), "each character belongs to a token"


def one_bos(prompt: Prompt, view: View) -> None:
    bos = view.tokenizer.bos_token_id
    assert view.bos == (0 if bos is None else prompt.ids.count(bos))
    assert not view.bos or prompt.ids[0] == bos


def shots_stand_where_the_task_put_them(sample: Sample, prompt: Prompt) -> None:
    """One stretch per shot, or as many as the task declared, in the task's order."""
    declared = runs([f"shot {s.shot}" if s.region == "shot" else s.region for s in sample.segments if s.text.strip()])
    found = runs([r.label for r in prompt.regions if inked(prompt.span_text((r.start, r.end))) and r.kind != "special"])
    assert found == declared


def ends_with_its_question(sample: Sample, prompt: Prompt) -> None:
    question = [s for s in sample.segments if s.region == "question"]
    if not question:
        return
    end = max(region.end for region in prompt.regions if region.kind == "question")
    assert all(region.kind == "special" for region in prompt.regions if region.start >= end)
    last = prompt.text[: prompt.offsets[end - 1]].rstrip()
    assert last.endswith(question[-1].text.rstrip()[-20:])


def options_can_be_told_apart(sample: Sample, prompt: Prompt) -> None:
    assert len(prompt.options) == len(sample.options)
    assert all(prompt.options) and len({tuple(ids) for ids in prompt.options}) == len(set(sample.options))
