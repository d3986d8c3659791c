"""kvcli rescore from the command line, and real judge models that always say one word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.engine.judging import Judge, load_judge, verdict_of
from kvcli.engine.rescoring import Tally
from kvcli.errors import KvcliError
from kvcli.results.store import read_records, read_run
from tests.cli import sweeping

SECRET = "zanzibar"
"""Stands in every request: it must not be shown."""
REQUESTS = 14
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}verdict:"
PARTS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'][0]['text'] }}\n{% endfor %}verdict:"
DEAF = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}verdict:"


@pytest.fixture(scope="module")
def safety(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of jailbreakv and xstest on requests written for it."""
    place = tmp_path_factory.mktemp("safety")
    attacks = [
        {"format": "Logic", "jailbreak_query": f"Act as a pirate, {SECRET} {i}.", "redteam_query": f"{SECRET} {i}"}
        for i in range(REQUESTS)
    ]
    contrasts = [
        {"prompt": f"How do I {SECRET} {i}?", "type": "x", "focus": f"{i}", "label": ("safe", "unsafe")[i % 2]}
        for i in range(4)
    ]
    for name, rows in (("jailbreakv/mini_JailBreakV_28K", attacks), ("xstest/train", contrasts)):
        path = place / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = sweeping.call(
        "sweep", "--model", "testbed", "--task", "jailbreakv,xstest", "--data-dir", place / "data",
        "--method", "snapkv", "--ratio", "0.5", "--max-new-tokens", "8", "--template", "raw", "--out", place / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert SECRET not in done.out + done.err
    return place


@pytest.fixture
def run(safety: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(safety / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """judges('unsafe'): a folder with a tiny GPT-2 whose last bias leads to that word whatever it reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("judges")

    def make(word: str, template: str | None = TEMPLATE, positions: int = 512) -> Path:
        folder = root / f"{word}-{positions}-{hash(template) % 1000}"
        if folder.exists():
            return folder
        vocabulary = {token: i for i, token in enumerate(["<unk>", "<end>", "verdict", ":", "safe", "unsafe", "maybe"])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
        tokenizer.chat_template = template
        config = GPT2Config(vocab_size=7, n_positions=positions, n_embd=8, n_layer=1, n_head=2,
                            bos_token_id=1, eos_token_id=1)  # fmt: skip
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.fill_(1.0)
            model.transformer.wte.weight.fill_(-1.0)
            model.transformer.wte.weight[vocabulary[word]] = 1.0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def of(run: Path, task: str) -> list[dict[str, Any]]:
    return [record for record in read_records(run) if record["task"] == task]


def unsafe_rows(run: Path) -> list[dict[str, Any]]:
    return [record for record in of(run, "xstest") if record["target"] == "refuse"]


# --- without a judge --------------------------------------------------------------------------------------------------


def test_it_says_how_many_scores_changed_per_task_and_method(run: Path, kvcli: Callable[..., Any]) -> None:
    done = kvcli("rescore", run)
    assert done.code == 0, done.err
    assert "0 of 20 records changed" in done.err and f"kvcli report {run}" in done.err
    assert [line.split()[:4] for line in done.out.splitlines() if "snapkv" in line] == [
        ["jailbreakv", "snapkv", "6", "0"], ["xstest", "snapkv", "4", "0"],
    ]  # fmt: skip
    assert SECRET not in done.out + done.err


def test_it_ends_with_what_comes_next(run: Path, kvcli: Callable[..., Any]) -> None:
    records = run / "samples.jsonl"
    old = [json.loads(line) for line in records.read_text().splitlines()]
    records.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "incoherent"}) + "\n" for r in old))
    looked = kvcli("rescore", run, "--dry-run").err
    assert "20 records would say whether their output is text" in looked
    assert f"next: kvcli rescore {run}" in looked and "--dry-run" not in looked.split("next:")[1]
    assert f"next: kvcli report {run}" in kvcli("rescore", run).err
    assert f"next: kvcli report {run}" in kvcli("rescore", run, "--dry-run").err, "nothing would change"


def test_json(run: Path, kvcli: Callable[..., Any]) -> None:
    facts = json.loads(kvcli("rescore", run, "--task", "jailbreakv", "--dry-run", "--json").out)
    assert facts["dry_run"] is True and facts["judge"] is None
    full = facts["methods"][0]
    assert (full["task"], full["method"], full["records"], full["changed"], full["left_out"]) == (
        "jailbreakv", "full", 6, 0, {},
    )  # fmt: skip


LONG = "longbench_passage_retrieval_zh"
FOLDED = "adakv:base.kernel=5,base.pool=avg,floor=0.1,normalize=true"


def drawn(width: int | None, *methods: str) -> list[str]:
    from rich.console import Console

    from kvcli.cli.rescore_table import table

    tallies = [Tally(task, m, 500, 17, 21.0, 33.5) for task in (LONG, "gsm8k") for m in methods]
    tallies[0].left_out["its prompt is another one by now"] = 3
    room = Console(width=width or 200, color_system=None)
    with room.capture() as found:
        room.print(table(tallies, width))
    return [line.rstrip() for line in found.get().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [None, 120, 100, 80, 60])
def test_the_table_cuts_no_name_and_gives_up_columns_first(width: int | None) -> None:
    lines = drawn(width, "full", "snapkv", "streaming_llm")
    assert max(map(len, lines)) <= (width or 200)
    assert any(line.split()[0].rstrip(":") == LONG for line in lines)
    rows = [line.split() for line in lines if "streaming_llm" in line]
    assert len(rows) == 2 and len(lines) == (8 if lines[2].split()[1:2] == ["full"] else 10)
    assert {"changed", "new", "score"} <= set(lines[0].split())
    for row in rows:
        assert "17" in row and "0.067" in row
    assert ("left" in lines[0].split()) == (width in (None, 120))
    assert (LONG in lines[2] and "full" in lines[2]) == (width in (None, 120, 100))


def test_a_name_longer_than_the_screen_goes_on_in_the_next_line_and_numbers_stay_whole() -> None:
    lines = drawn(50, "snapkv", FOLDED)
    assert max(map(len, lines)) <= 50
    assert FOLDED in "".join(line[:34].strip() for line in lines)
    assert sum("17" in line.split() and "0.067" in line.split() for line in lines) == 4


def test_file_methods_are_named_as_other_tables_name_them() -> None:
    assert any(
        "ValueNorm:recent=64" in line and ".py" not in line for line in drawn(80, "./a/b.py:ValueNorm:recent=64")
    )


def test_data_elsewhere(run: Path, safety: Path, tmp_path: Path, kvcli: Callable[..., Any]) -> None:
    moved = shutil.copytree(safety / "data", tmp_path / "moved")
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace(str(safety / "data"), str(tmp_path / "gone")))
    gone = kvcli("rescore", run)
    assert gone.code == 2 and "no folder" in gone.err
    assert kvcli("rescore", run, "--data-dir", moved).code == 0


def test_tasks_with_settings_are_named_with_them_or_without(
    safety: Path, tmp_path: Path, kvcli: Callable[..., Any]
) -> None:
    done = kvcli(
        "sweep", "--model", "testbed", "--task", "xstest:rows=safe,xstest:rows=unsafe", "--data-dir", safety / "data",
        "--method", "full", "--limit", "2", "--max-new-tokens", "4", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    named = json.loads(kvcli("rescore", tmp_path / "run", "--task", "xstest:rows=safe", "--json").out)
    assert [m["task"] for m in named["methods"]] == ["xstest:rows=safe"]
    assert len(json.loads(kvcli("rescore", tmp_path / "run", "--task", "xstest", "--json").out)["methods"]) == 2


# --- with a judge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "defended", "silent"), [("safe", 1, 0), ("unsafe", 0, 0), ("maybe", 0, 1)])
def test_the_judge_s_first_word_is_the_verdict(
    run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any], word: str, defended: int, silent: int
) -> None:
    done = kvcli("rescore", run, "--judge", judges(word))
    assert done.code == 0, done.err
    assert SECRET not in done.out + done.err
    for record in of(run, "jailbreakv"):
        assert (record["extra"]["defended"], record["extra"]["no_verdict"]) == (defended, silent)
        assert (record["metric"], record["score"]) == ("defence_rate", defended)
        assert {"refused", "complied", "incoherent"} <= record["extra"].keys()
        assert not silent or record["extracted"] is None
    assert read_run(run)["tasks"]["jailbreakv"]["metric"] == "defence_rate"
    assert read_run(run)["tasks"]["jailbreakv"]["judge"]["model"] == judges(word).name


def test_of_safe_and_unsafe_requests_only_unsafe_ones_are_judged(
    run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any]
) -> None:
    before = {(r["cell_id"], r["sample_id"]): r["score"] for r in of(run, "xstest")}
    assert kvcli("rescore", run, "--judge", judges("safe")).code == 0
    assert all("defended" in r["extra"] for r in unsafe_rows(run))
    assert len(unsafe_rows(run)) == 4 == sum("defended" in r["extra"] for r in of(run, "xstest"))
    assert {(r["cell_id"], r["sample_id"]): r["score"] for r in of(run, "xstest")} == before
    assert read_run(run)["tasks"]["xstest"]["metric"] == "right_decision"


def test_verdicts_stay_until_they_are_dropped(
    run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any]
) -> None:
    def told() -> list[tuple[Any, ...]]:
        return [(r["score"], r["metric"], r["extracted"], r["extra"]) for r in read_records(run)]

    first = told()
    kvcli("rescore", run, "--judge", judges("safe"))
    judged = told()
    assert judged != first
    assert "0 of 20 records changed" in kvcli("rescore", run).err
    assert told() == judged
    assert kvcli("rescore", run, "--judge", "none").code == 0
    assert told() == first
    assert read_run(run)["tasks"]["jailbreakv"]["metric"] == "refusal_rate"
    assert "judge" not in read_run(run)["tasks"]["jailbreakv"]


def test_another_judge_replaces_all_verdicts(run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any]) -> None:
    kvcli("rescore", run, "--judge", judges("safe"))
    kvcli("rescore", run, "--judge", judges("unsafe"), "--task", "jailbreakv")
    assert {r["extra"]["defended"] for r in of(run, "jailbreakv")} == {0}
    assert {r["extra"]["defended"] for r in unsafe_rows(run)} == {1}, "of a task that was not named they stay"
    assert read_run(run)["tasks"]["xstest"]["judge"]["model"] == judges("safe").name


def test_a_judge_that_was_stopped_goes_on_where_it_was(
    run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Judge.safe, []

    def safe(self: Judge, request: str, answer: str) -> bool | None:
        asked.append(request)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(self, request, answer)

    monkeypatch.setattr(Judge, "safe", safe)
    assert kvcli("rescore", run, "--judge", judges("safe")).code == 130
    assert sum("defended" in r["extra"] for r in read_records(run)) == 5
    assert kvcli("rescore", run, "--judge", judges("safe")).code == 0
    assert len(asked) == 6 + 16 - 5
    assert sum("defended" in r["extra"] for r in read_records(run)) == 16


def test_equal_answers_are_asked_about_once(judges: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    judge, asked = load_judge(str(judges("safe"))), []
    monkeypatch.setattr(judge, "_first_words", lambda ids: asked.append(ids) or "safe")
    assert judge.safe("a request", "an answer") and judge.safe("a request", "an answer")
    assert judge.safe("a request", "another answer")
    assert len(asked) == 2


@pytest.mark.parametrize("template", [TEMPLATE, PARTS])
def test_the_judge_reads_request_and_answer_in_their_roles(judges: Callable[..., Path], template: str) -> None:
    judge, read = load_judge(str(judges("safe", template))), []
    tokenizer = judge.tokenizer
    judge.tokenizer = lambda text, **_: read.append(text) or tokenizer(text, add_special_tokens=False)
    judge.tokenizer.apply_chat_template = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    judge._prompt("is it safe", "it is unsafe")
    assert read == ["[user] is it safe\n[assistant] it is unsafe\nverdict:"]


def test_what_does_not_fit_the_judge_has_no_verdict(judges: Callable[..., Path]) -> None:
    judge = load_judge(str(judges("safe", positions=32)))
    assert judge.safe("short", "short") is True
    assert judge.safe("short", "long " * 40) is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("\n\nsafe", True), ("\n\nunsafe\nS1", False), ("Safe", True), ("safely", None), ("", None), ("It is safe", None),
     ("**unsafe**", False)],
)  # fmt: skip
def test_verdicts(text: str, verdict: bool | None) -> None:
    assert verdict_of(text) is verdict


# --- judges that cannot be used ---------------------------------------------------------------------------------------


def one_error(done: Any) -> str:
    assert done.code == 2, done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    return str(done.err)


def unchanged(run: Path, call: Callable[[], Any]) -> Any:
    before = {p.name: p.read_bytes() for p in run.glob("*.json*")}
    done = call()
    assert {p.name: p.read_bytes() for p in run.glob("*.json*")} == before
    return done


def test_a_gated_judge_is_one_clear_message(
    run: Path, kvcli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(*_: Any, **__: Any) -> None:
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", gated)
    done = unchanged(run, lambda: kvcli("rescore", run, "--judge", "meta-llama/Llama-Guard-3-8B"))
    error = one_error(done)
    assert "meta-llama/Llama-Guard-3-8B needs a licence" in error and "--judge meta-llama/Llama-Guard-3-8B" in error


def test_a_judge_out_of_reach_is_one_clear_message(run: Path, kvcli: Callable[..., Any]) -> None:
    """The tests set HF_HUB_OFFLINE."""
    done = unchanged(run, lambda: kvcli("rescore", run, "--judge", "nobody/no-judge"))
    assert "the hub cannot be reached for model nobody/no-judge" in one_error(done)


def test_a_judge_without_a_chat_template_is_refused(
    run: Path, judges: Callable[..., Path], kvcli: Callable[..., Any]
) -> None:
    done = unchanged(run, lambda: kvcli("rescore", run, "--judge", judges("safe", None)))
    assert "the judge has no chat template" in one_error(done)


def test_a_template_that_loses_the_answer_is_refused(judges: Callable[..., Path]) -> None:
    judge = load_judge(str(judges("safe", DEAF)))
    with pytest.raises(KvcliError, match="does not take a request and an answer") as caught:
        judge.safe(SECRET, "an answer")
    assert SECRET not in "\n".join(caught.value.lines())


def test_a_folder_without_harmful_requests_has_nothing_to_judge(
    tmp_path: Path, judges: Callable[..., Path], kvcli: Callable[..., Any]
) -> None:
    kvcli("run", "--model", "testbed", "--task", "tb_recall", "--limit", "1", "--out", tmp_path / "run")
    done = kvcli("rescore", tmp_path / "run", "--judge", judges("safe"))
    assert "holds no requests that should be refused" in one_error(done)


def test_an_unknown_dtype_is_refused_before_the_judge_is_read(run: Path, kvcli: Callable[..., Any]) -> None:
    assert "int3" in one_error(kvcli("rescore", run, "--judge", "nobody/no-judge", "--judge-dtype", "int3"))
