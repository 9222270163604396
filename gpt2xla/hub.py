"""Fetches from the Hugging Face hub and pushes to it, and says in one sentence why that failed.

The hub's client lets through errors of the HTTP libraries below it (requests, httpx, xet), and `datasets` wraps them once
more. The functions here look through the whole chain of causes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2xla.errors import InputError, RunFailed, in_one_line

_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
_BUSY = (408, 429)  # status codes that, like those from 500 on, may be another one later


def is_id(name: str) -> bool:
    """Tell whether `name` could be the id of a repository on the hub, such as "gpt2" or "owner/name"."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_offline() -> bool:
    """Tell whether the user has set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def snapshot(repo: str, patterns: Iterable[str], kind: str = "model") -> Path:
    """Return the folder in the hub's cache with those files of a model, or of another `kind` of repository ("dataset"), that
    match `patterns`; fetch what is missing.

    The client locks each file: of several processes on a host one fetches it, and the others wait and find it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # in a log they are only noise
        disable_progress_bars()
    return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))


def repository(name: str, flag: str) -> str:
    """Return the full name, `owner/name`, of a model's repository to which this login may write. A new one is made, private.

    Raises InputError for `flag` if that is impossible. Nothing is written to a repository that is there already."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if is_offline():
        raise InputError(f"{flag} {name}: HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise InputError(f"{flag} {name}: not logged in to the hub; run hf auth login, or set HF_TOKEN")
    try:
        full = HfApi().create_repo(name, private=True, exist_ok=True).repo_id
        # The hub tells only those who may write how a file is to be uploaded.
        HfApi().preupload_lfs_files(full, [CommitOperationAdd("README.md", b"-")])
    except Exception as error:  # the client lets errors of several HTTP libraries through
        raise InputError(f"{flag} {name}: {why_not_pushed(error)}") from None
    return full


def push(name: str, files: Mapping[str, Path | bytes], message: str, branch: str | None) -> str:
    """Upload `files` in one commit, to `branch` or the main one, and return the address. The client's errors pass."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if branch:
        HfApi().create_branch(name, branch=branch, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    HfApi().create_commit(name, operations, commit_message=message, revision=branch)
    return f"{HfApi().endpoint}/{name}" + (f"/tree/{branch}" if branch else "")


def text_of(name: str, file: str, branch: str | None) -> str:
    """Return a text file of a repository; "" if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=branch)).read_text(encoding="utf-8")
    except (EntryNotFoundError, RevisionNotFoundError):
        return ""


def why_not_pushed(error: BaseException) -> str:
    """Return why an upload, or the check before it, failed, and the fix."""
    from huggingface_hub import errors

    status = response.status_code if (response := _response(error)) is not None else None
    if status == 401 and not _caused_by(error, errors.RepositoryNotFoundError):
        return "the hub does not know this login; run hf auth login, or correct HF_TOKEN"
    if status in (401, 403, 404):
        return "this login may not write there; use a token with write access, and a repository of yours (owner/name)"
    if is_temporary(error):
        return f"the hub cannot be reached ({answer(error)}); check the network, or try again later"
    return f"the hub refuses it ({answer(error)}); fix that and try again"


@contextlib.contextmanager
def explained(what: str, repo: str, otherwise: str, kind: str = "model") -> Iterator[None]:
    """Turn an error inside the block into an InputError: `what`, why `repo` did not come, the fix, or `otherwise`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the client lets errors of several HTTP libraries through
        raise InputError(f"{what}; {reason(error, repo, kind)}, or {otherwise}") from None


def reason(error: BaseException, repo: str, kind: str = "model") -> str:
    """Return why `repo`, a `kind` of repository, could not be fetched, and the fix."""
    from huggingface_hub import errors

    if _caused_by(error, errors.HFValidationError):
        return f"{repo} is not a name on the hub; correct it"
    if is_offline():
        return f"{repo} is not whole in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
    if _caused_by(error, errors.GatedRepoError):
        return f"{repo} is gated on the hub; ask for access on its page there and log in (hf auth login)"
    if _caused_by(error, errors.RepositoryNotFoundError):
        found = f"the hub has no {kind} {repo}, or a private one ({answer(error)})"
        return f"{found}; check the spelling, log in (hf auth login)"
    if _response(error) is not None:
        fix = "try again later" if is_temporary(error) else "check the name"
        return f"{repo} could not be downloaded: the hub answers with status {answer(error)}; {fix}"
    if is_temporary(error):
        return f"{repo} could not be downloaded: the hub cannot be reached ({answer(error)}); check the network"
    return f"{repo} could not be downloaded ({answer(error)}); fix that and try again"


def answer(error: BaseException) -> str:
    """Return in one line what came instead of a file: the status and address of the failed request, or the error."""
    if (response := _response(error)) is not None:
        import http.client  # only here: --help of every program imports this file

        meaning = http.client.responses.get(response.status_code, "")
        return f"{response.status_code} {meaning}".strip() + f" for {str(response.url).split('?')[0]}"
    first = next((link for link in _chain(error) if _is_network(link)), error)
    reason = (getattr(first, "strerror", None) or in_one_line(first)).rstrip(".")
    with contextlib.suppress(AttributeError, RuntimeError):  # what httpx raises if it knows no request
        return f"{reason} for {str(first.request.url).split('?')[0]}"  # type: ignore[attr-defined]
    return reason


def has_answered(error: BaseException) -> bool:
    """Tell whether the hub did answer, with the status of an error."""
    return _response(error) is not None


def is_temporary(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: the network failed, or the hub was busy or broken."""
    if isinstance(error, InputError | RunFailed):
        return False
    if (response := _response(error)) is not None:
        return response.status_code in _BUSY or response.status_code >= 500
    return any(map(_is_network, _chain(error)))


def _is_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES:
        return True
    return type(error) is OSError and not error.errno  # the client's, for a file of which only a part came


def _response(error: BaseException) -> Any:
    """Return the hub's response that `error` is about, or None."""
    return next((found for link in _chain(error) if (found := getattr(link, "response", None)) is not None), None)


def _caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(link, kind) for link in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, its cause, the cause's cause, and so on. `datasets` hides causes with `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
