"""kvcli prefetch against a small hub of its own, over HTTP: what is fetched, where it lies, and what can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from kvcli.cli.prefetch import wanted

COMMIT = "c0ffee" + "0" * 34
ROWS = [{"question": f"How many is {i} and {i}?", "answer": f"{2 * i}\n#### {2 * i}"} for i in range(12)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TASK = "task: sums\ndataset_path: org/sums\ndoc_to_text: question\ndoc_to_target: \"{{ answer | after('#### ') }}\"\n"


class Hub:
    """Repositories by kind and name: their files; those in `gated` want a licence. Counts what was sent."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.sent: list[str] = []
        self.asked = 0
        self.broken: set[str] = set()
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message="no")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            wanted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            match = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/", self.path)
            if not match:
                return self.refuse(404, "RepoNotFound")
            files = getattr(hub, match[1]).get(match[2], {})
            paths = json.loads(wanted)["paths"] if wanted.startswith("{") else re.findall(r"paths=([^&]+)", wanted)
            paths = [unquote(path) for path in paths]
            return self.json([entry(name, files[name]) for name in files if name in paths])

        def do_GET(self) -> None:
            hub.asked += 1
            path = unquote(urlsplit(self.path).path)
            api = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?$", path)
            file = re.match(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
            if api:
                self.entry(getattr(hub, api[1]), api[2], api[3] or "")
            elif file:
                self.file(hub.datasets if file[1] else hub.models, file[2], file[3], file[4])
            else:
                self.refuse(404, "EntryNotFound")

        def entry(self, repositories: dict[str, dict[str, bytes]], name: str, rest: str) -> None:
            if name not in repositories:
                return self.refuse(404, "RepoNotFound")
            revision = re.match(r"/(revision|tree)/([^/]+)", rest)
            if revision and revision[2] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if rest == "/auth-check":
                return self.refuse(403, "GatedRepo") if name in hub.gated else self.json({})
            files = repositories[name]
            if rest.startswith("/tree"):
                return self.json([entry(file, data) for file, data in files.items()])
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            about = {"id": name, "sha": COMMIT, "siblings": siblings, "gated": "manual" if name in hub.gated else False}
            return self.json({**about, "private": False, "tags": [], "downloads": 0, "disabled": False})

        def file(self, repositories: dict[str, dict[str, bytes]], name: str, revision: str, file: str) -> None:
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if name not in repositories or file not in repositories[name]:
                return self.refuse(404, "EntryNotFound")
            if file in hub.broken and self.command == "GET":
                return self.refuse(403, "")
            data = repositories[name][file]
            if self.command == "GET":
                hub.sent.append(f"{name}/{file}")
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    return Handler


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub()
    found.models["org/tiny"] = tiny(tmp_path / "tiny")
    found.datasets["org/sums"] = {"test.jsonl": JSONL, "README.md": b"# Sums\n"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


def tiny(folder: Path) -> dict[str, bytes]:
    """A small model with its tokenizer as save_pretrained writes it, and files that transformers does not read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted({w for row in ROWS for w in re.findall(r"\w+|[^\w\s]", str(row))})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {
        "README.md": b"# Tiny\n",
        "original/consolidated.00.pth": b"x" * 999,
        "pytorch_model.bin": b"y" * 99,
    }


def kvcli(hub: str, home: Path, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
    if "HF_HUB_OFFLINE" not in more:
        env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "kvcli", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=home.parent)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "sums.yaml").write_text(TASK)
    return tmp_path / "home"


@pytest.mark.slow
def test_a_model_and_a_task_are_fetched_and_then_used_without_the_hub(hub: Hub, home: Path) -> None:
    asked = ("--model", "org/tiny", "--task", "./sums.yaml")
    done = kvcli(hub.url, home, "prefetch", *asked, "--json")
    assert done.returncode == 0, done.stderr
    model, task = json.loads(done.stdout)
    assert (model["state"], model["commit"], model["name"]) == ("fetched", COMMIT, "org/tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model["files"])
    assert model["bytes"] == sum(len(hub.models["org/tiny"][name]) for name in model["files"])
    assert task["splits"] == {"test": 12} and task["bytes"] > 0 and Path(task["place"]).is_dir()
    unread = {"org/tiny/README.md", "org/tiny/original/consolidated.00.pth", "org/tiny/pytorch_model.bin"}
    assert not unread & set(hub.sent)

    again = kvcli(hub.url, home, "prefetch", *asked, "--json")
    assert [row["state"] for row in json.loads(again.stdout)] == ["was there", "loaded"]
    assert len([name for name in hub.sent if name.endswith(".safetensors")]) == 1

    run = (
        "sweep",
        *asked,
        "--method",
        "random",
        "--ratio",
        "0.5",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--out",
        "r",
    )
    away = kvcli("http://127.0.0.1:9", home, *run, HF_HUB_OFFLINE="1")
    assert away.returncode == 0, away.stderr
    assert len((home.parent / "r" / "samples.jsonl").read_text().splitlines()) == 4


def test_a_dry_run_says_what_would_be_fetched_and_fetches_nothing(hub: Hub, home: Path) -> None:
    done = kvcli(hub.url, home, "prefetch", "--model", "org/tiny", "--task", "./sums.yaml,tb_recall", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.split()[:1] in (["model"], ["task"])}
    assert "to fetch" in lines["org/tiny"] and COMMIT[:12] in lines["org/tiny"]
    assert "to load" in lines["sums"] and "org/sums" in lines["sums"] and "ready" in lines["tb_recall"]
    assert hub.sent == [] and "without --dry-run" in done.stderr


def test_a_dry_run_of_what_needs_no_hub_asks_it_nothing(hub: Hub, home: Path) -> None:
    asked = ("--model", "testbed", "--task", "./sums.yaml,tb_recall", "--dry-run")
    done = kvcli(hub.url, home, "prefetch", *asked)
    assert done.returncode == 0 and hub.asked == 0, done.stderr
    assert "needs no hub" in done.stdout and "to load" in done.stdout and "warning" not in done.stderr


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_dry_run_without_the_hub_says_in_one_line_what_it_cannot_know(home: Path, offline: dict[str, str]) -> None:
    began = time.monotonic()
    asked = ("--model", "org/tiny,org/other@v2,testbed", "--tokenizer", "org/words", "--task", "./sums.yaml")
    done = kvcli("http://127.0.0.1:9", home, "prefetch", *asked, "--dry-run", **offline)
    assert done.returncode == 0 and time.monotonic() - began < 25, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: the hub cannot be reached (")
    assert warnings[0].endswith("only what the cache holds of org/tiny, org/other@v2, org/words")
    assert not offline or "(HF_HUB_OFFLINE is set)" in warnings[0]
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if len(line.split()) > 2}
    for name in ("org/tiny", "org/other@v2", "org/words"):
        assert "not known" in lines[name] and "0 files in the cache" in lines[name]
    assert "needs no hub" in lines["testbed"] and "to load" in lines["sums"]
    assert "where the hub can be reached" in done.stderr


def test_names_are_whole_at_80_columns(kvcli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = kvcli("prefetch", "--model", "llama3-8b,r1-distill-llama-8b", "--task", "gsm8k", "--dry-run")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80
    for name in ("meta-llama/Meta-Llama-3-8B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"):
        assert any(line.split()[:2] == ["model", name] for line in done.out.splitlines())


def test_a_dry_run_without_the_hub_shows_what_the_cache_holds(hub: Hub, home: Path) -> None:
    assert kvcli(hub.url, home, "prefetch", "--model", "org/tiny").returncode == 0
    done = kvcli("http://127.0.0.1:9", home, "prefetch", "--model", "org/tiny", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["state"], row["commit"], row["fetched_bytes"]) == ("not known", COMMIT, None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(row["files"])
    assert row["bytes"] == sum(len(hub.models["org/tiny"][name]) for name in row["files"])


def test_a_dry_run_names_rows_that_are_nowhere(hub: Hub, home: Path) -> None:
    (home.parent / "mine.yaml").write_text("task: mine\ndoc_to_text: question\ndoc_to_target: answer\n")
    done = kvcli(hub.url, home, "prefetch", "--task", "./mine.yaml,./sums.yaml", "--dry-run")
    assert done.returncode == 2 and "task 'mine' names no data set on the hub" in done.stderr
    assert any(line.split()[:2] == ["task", "sums"] and "to load" in line for line in done.stdout.splitlines())


def test_a_tokenizer_alone_takes_no_weights(hub: Hub, home: Path) -> None:
    done = kvcli(hub.url, home, "prefetch", "--model", "testbed", "--tokenizer", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    own, tokenizer = json.loads(done.stdout)
    assert own["state"] == "needs no hub" and tokenizer["kind"] == "tokenizer"
    assert "org/tiny/tokenizer.json" in hub.sent and not [n for n in hub.sent if "safetensors" in n]


def test_a_gated_model_is_named_with_its_page_before_anything_is_fetched(hub: Hub, home: Path) -> None:
    hub.models["org/closed"] = dict(hub.models["org/tiny"])
    hub.gated.add("org/closed")
    done = kvcli(hub.url, home, "prefetch", "--model", "org/tiny,org/closed")
    assert done.returncode == 2 and hub.sent == []
    assert "error: org/closed needs a licence" in done.stderr and "given: --model org/closed" in done.stderr
    assert f"accept the licence on {hub.url}/org/closed, then: hf auth login" in done.stderr


def test_a_gated_data_set_is_named_with_its_page(hub: Hub, home: Path) -> None:
    hub.gated.add("org/sums")
    done = kvcli(hub.url, home, "prefetch", "--task", "./sums.yaml")
    assert done.returncode == 2 and "error: org/sums needs a licence" in done.stderr, done.stderr
    assert f"accept the licence on {hub.url}/datasets/org/sums, then: hf auth login" in done.stderr


@pytest.mark.parametrize(
    "model, what",
    [
        ("org/none", "the hub has no model org/none that you may read"),
        ("org/tiny@v9", "org/tiny has no revision 'v9'"),
        ("nonsense", "unknown model 'nonsense'"),
    ],
)
def test_names_the_hub_does_not_know(hub: Hub, home: Path, model: str, what: str) -> None:
    done = kvcli(hub.url, home, "prefetch", "--model", model)
    assert done.returncode == 2 and what in done.stderr and f"given: --model {model}" in done.stderr


def test_a_download_that_breaks_off_is_one_message(hub: Hub, home: Path) -> None:
    hub.broken.add("model.safetensors")
    done = kvcli(hub.url, home, "prefetch", "--model", "org/tiny")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the download of org/tiny broke off" in done.stderr and "goes on from there" in done.stderr
    hub.broken.clear()
    assert kvcli(hub.url, home, "prefetch", "--model", "org/tiny").returncode == 0


@pytest.mark.parametrize("asked", [("--model", "org/tiny"), ("--task", "./sums.yaml")])
def test_a_hub_that_is_away_is_one_message_within_20_seconds(home: Path, asked: tuple[str, ...]) -> None:
    began = time.monotonic()
    done = kvcli("http://127.0.0.1:9", home, "prefetch", *asked)
    assert done.returncode == 2 and time.monotonic() - began < 20
    assert "the hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_silent_hub_costs_at_most_20_seconds(home: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        began = time.monotonic()
        done = kvcli(f"http://127.0.0.1:{server.getsockname()[1]}", home, "prefetch", "--model", "org/tiny")
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr and time.monotonic() - began < 20


def test_without_a_network_it_says_so(home: Path) -> None:
    done = kvcli("http://127.0.0.1:9", home, "prefetch", "--model", "org/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr


def test_a_task_whose_rows_are_not_on_the_hub_leaves_the_others(hub: Hub, home: Path) -> None:
    (home.parent / "mine.yaml").write_text("task: mine\ndoc_to_text: question\ndoc_to_target: answer\n")
    done = kvcli(hub.url, home, "prefetch", "--task", "./mine.yaml,./sums.yaml")
    assert done.returncode == 2 and "task 'mine' names no data set on the hub" in done.stderr
    assert any(line.split()[:2] == ["task", "sums"] and "12 rows" in line for line in done.stdout.splitlines())


def test_nothing_to_fetch(kvcli: Any) -> None:
    done = kvcli("prefetch")
    assert done.code == 2 and "nothing to fetch" in done.err


@pytest.mark.parametrize(
    "files, weights, expected",
    [
        ("config.json model.safetensors pytorch_model.bin", True, "config.json model.safetensors"),
        ("config.json pytorch_model.bin", True, "config.json pytorch_model.bin"),
        (
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json a.json",
            True,
            "a.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
        ),
        ("consolidated.safetensors model.safetensors original/params.json", True, "model.safetensors"),
        ("training_args.bin pytorch_model.bin model.gguf flax_model.msgpack", True, "pytorch_model.bin"),
        ("tokenizer.model merges.txt vocab.json model.safetensors", False, "merges.txt tokenizer.model vocab.json"),
        ("modeling_mine.py config.json", True, "config.json"),
        ("chat_template.jinja README.md LICENSE", True, "chat_template.jinja"),
    ],
)
def test_which_files_transformers_reads(files: str, weights: bool, expected: str) -> None:
    assert wanted(dict.fromkeys(files.split(), 1), weights=weights, code=False) == expected.split()


def test_code_is_taken_only_where_it_is_trusted() -> None:
    assert wanted({"modeling_mine.py": 1}, weights=True, code=True) == ["modeling_mine.py"]
