"""Whether the hub can be reached, asked once and without retries: its own clients try again for minutes. What a
repository holds, and bringing it into the local cache."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvcli.errors import Exit, KvcliError

T = TypeVar("T")

SECONDS = 12.0
"""How long an unreachable hub is waited for; with the imports it stays under 20 s."""

os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")


def unreachable(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """Why the hub cannot be reached, empty when it answers (even with a refusal)."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"

    def ask() -> str:
        api = HfApi()
        info = api.dataset_info if kind == "dataset" else api.model_info
        try:
            info(name, revision=revision, timeout=SECONDS * 0.8)
        except HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else 0
            return f"it answers with status {status}" if status >= 500 or status == 407 else ""
        except Exception as e:
            return str(e).split("\n")[0] or type(e).__name__
        return ""

    return _within(SECONDS, ask, _LATE)


_LATE = f"no answer within {SECONDS:.0f} s"


@dataclass(frozen=True)
class Repository:
    """A model's entry on the hub: its commit, and its files with their sizes in bytes."""

    name: str
    revision: str | None
    commit: str
    files: Mapping[str, int]


def look_up(name: str, revision: str | None, given: str) -> Repository:
    """What a model's repository holds, and that its files may be had.

    Raises KvcliError where the hub cannot be reached, knows no such repository or revision, or wants its licence
    accepted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    reason = unreachable("model", name, revision)
    if reason:
        fix = "run this where there is a network; its cache (HF_HOME) can be copied from there"
        raise KvcliError(f"the hub cannot be reached for {name}: {reason}", given=given, fix=fix)
    api = HfApi()

    def ask() -> Any:
        try:
            info = api.model_info(name, revision=revision, files_metadata=True, timeout=SECONDS * 0.8)
            api.auth_check(name)
        except Exception as e:
            return e
        return info

    found = _within(SECONDS, ask, TimeoutError(_LATE))
    if isinstance(found, GatedRepoError):
        raise gated(name, given)
    if isinstance(found, RevisionNotFoundError):
        raise KvcliError(f"{name} has no revision '{revision}'", given=given, fix="a branch, a tag or a commit")
    if isinstance(found, RepositoryNotFoundError):
        fix = "check the name; of a private one: hf auth login"
        raise KvcliError(f"the hub has no model {name} that you may read", given=given, fix=fix)
    if isinstance(found, HfHubHTTPError | OSError):
        fix = "try again later"
        raise KvcliError(f"the hub's answer for {name} cannot be used: {_first_line(found)}", given=given, fix=fix)
    if isinstance(found, Exception):
        raise found
    files = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    return Repository(name, revision, str(found.sha), files)


def gated(name: str, given: str, kind: Literal["model", "dataset"] = "model") -> KvcliError:
    """The error for files that want a licence accepted, with the page where that is done."""
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    fix = f"accept the licence on {page}, then: hf auth login"
    return KvcliError(f"{name} needs a licence", given=given, fix=fix)


def missing(repository: Repository, files: Sequence[str]) -> list[str]:
    """Those of the files that are not in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return [
        f for f in files if not isinstance(try_to_load_from_cache(repository.name, f, revision=repository.commit), str)
    ]


def cache_folder() -> Path:
    """Where models are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def fetch(repository: Repository, files: Sequence[str], given: str) -> Path:
    """Brings files into the local cache, so that the same name finds them offline. Returns their folder.

    Raises KvcliError where the download breaks off, or the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(repository.name, revision=repository.revision, allow_patterns=list(files))
    except GatedRepoError as e:
        raise gated(repository.name, given) from e
    except (HfHubHTTPError, OSError) as e:
        code = Exit.ENVIRONMENT if isinstance(e, OSError) and e.errno == errno.ENOSPC else Exit.USAGE
        fix = "the same command goes on from there"
        what = f"the download of {repository.name} broke off: {_first_line(e)}"
        raise KvcliError(what, given=given, fix=fix, code=code) from e
    return Path(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _within(seconds: float, ask: Callable[[], T], late: T) -> T:
    answers: list[T] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else late


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The hub client and `datasets` (where it is in use) look at the local cache only."""
    import huggingface_hub.constants as hub

    places = [hub] + ([sys.modules["datasets"].config] if "datasets" in sys.modules else [])
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
