"""Finds out whether a bucket is fit for a run's checkpoints, and how long one takes: `gpt2xla doctor --bucket URL`."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2xla.config import GeneralConfig
from gpt2xla.config.paths import is_url
from gpt2xla.errors import InputError, in_one_line
from gpt2xla.storage import LOGGER, Bucket, opened

SECONDS, _SECONDS_TO_CLEAN_UP = 48.0, 8.0
_LISTED_WITHIN = 10.0
_FIRST_BYTES, _MOST_BYTES, _SECONDS_OF_UPLOAD = 1 << 20, 64 << 20, 8.0
_FILES = 4  # a checkpoint is several files, too, of which several are sent at once
SPOT_SECONDS = 30  # between the notice and the end of a spot machine: Google Cloud, "Spot VMs"
CHECKPOINT_BYTES = 12 * 124_439_808  # GPT-2 (124M): weights and two moments in fp32

_LOGIN = {
    "gs": "gcloud auth application-default login, or give the machine a service account",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    "hf": "hf auth login, or set HF_TOKEN",
}
_RIGHTS = {
    "gs": "give the account the role Storage Object User (roles/storage.objectUser) on the bucket",
    "s3": "check the keys, and allow s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject",
    "hf": "use a token that may write",
}
_CREATION = {"gs": "gcloud storage buckets create gs://{bucket} --location=REGION", "s3": "aws s3 mb s3://{bucket}"}
# Words in the clients' errors -> what to do, by scheme.
_FIXES = (
    (r"credential|anonymous|unauthorized|\b401\b|InvalidAccessKey|SignatureDoesNotMatch|expired|invalid_grant", _LOGIN),
    (r"forbidden|\b403\b|access ?denied|permission", _RIGHTS),
    (r"NoSuchBucket|bucket does not exist|\b404\b", _CREATION),
)


class _TimeIsUp(BaseException):
    """Not an Exception: what tries again after errors must not catch it."""


def examine(url: str, show: Callable[[str, str], None]) -> list[str]:
    """Try everything that a run does with a bucket, within a minute, and return a line with its fix for each problem.

    Nothing is left there, also after Ctrl-C.

    Args:
        show: called with the name and the words of each finding, as it is made.

    Raises InputError if it is no URL, or cannot be opened, as for want of a package."""
    if not is_url(url):
        raise InputError(f"--bucket {url}: name a URL, such as gs://bucket/run")
    bucket, heard = Bucket(url, "--bucket"), _Heard()
    folder = f"doctor-{socket.gethostname()}-{secrets.token_hex(4)}"
    found: list[str] = []
    written: list[str] = []
    loggers = (LOGGER, logging.getLogger("gcsfs"))
    for logger in loggers:
        logger.addHandler(heard)
    try:
        with _within(SECONDS):
            for problem in _examine(bucket, folder, written, show):
                found.append(problem)
    except OSError as error:
        what = "it does not exist" if isinstance(error, FileNotFoundError) else in_one_line(error)
        text = "NoSuchBucket" if isinstance(error, FileNotFoundError) else f"{error} {error.__cause__}"
        found.append(f"{'' if bucket.url in what else bucket.url + ': '}{what}; {_fix(bucket.url, text)}")
        show("stopped", "see below")
        if isinstance(error, PermissionError | FileNotFoundError) and len(written) == 1:
            written.clear()
    except _TimeIsUp:
        reason = f" ({heard.last})" if heard.last else ""
        found.append(f"{bucket.url} did not answer within {SECONDS:.0f} s{reason}; {_fix(bucket.url, heard.last)}")
        show("stopped", "see below")
    finally:
        try:
            with _within(_SECONDS_TO_CLEAN_UP):
                bucket.remove(written)
        except (OSError, _TimeIsUp):
            found.append(f"{bucket.url}/{folder} may be left there; delete it")
        for logger in loggers:
            logger.removeHandler(heard)
    return found


class _Heard(logging.Handler):
    """What is said of an error after which the store is asked again, for minutes."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()[:200]


def _examine(bucket: Bucket, folder: str, written: list[str], show: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the problems. The names of objects are put into `written` before they are."""
    first, rates = f"{folder}/first", [f"{folder}/rate-{number}" for number in range(_FILES)]
    written.append(first)
    begun = time.monotonic()
    bucket.create(first, b"first")
    show("write", f"an object in {time.monotonic() - begun:.2f} s")

    begun = time.monotonic()
    while not (is_listed := first in bucket.files(folder)):
        if time.monotonic() - begun > _LISTED_WITHIN:
            break
        time.sleep(0.2)
    seconds = time.monotonic() - begun
    if not is_listed:
        show("list", f"a new object is not listed within {seconds:.0f} s")
        yield f"{bucket.url} lists a new object only after {seconds:.0f} s or more: a run that resumes would miss it"
    else:
        show("list", "a new object at once" if seconds < 2 else f"a new object after {seconds:.0f} s")

    is_kept = not bucket.create(first, b"second") and bucket.read(first) == b"first"
    show("create", "refused where there is an object" if is_kept else "overwrites what is there")
    if not is_kept:
        yield f"{bucket.url} cannot create an object only if there is none: never start a second run there"

    bucket.remove([first])
    is_gone = bucket.read(first) is None
    show("delete", "works" if is_gone else "the object is still there")
    if not is_gone:
        yield f"{bucket.url} shows an object that was deleted; --saved-checkpoint-limit would not make room"

    with tempfile.TemporaryDirectory(prefix="gpt2xla-doctor-") as scratch:
        written += rates
        upload, download, is_same = _rates(bucket, rates, Path(scratch))
    show("upload", f"{upload / 1e6:,.1f} MB/s")
    show("download", f"{download / 1e6:,.1f} MB/s" + ("" if is_same else ", but not what was uploaded"))
    if not is_same:
        yield f"{bucket.url} does not return what was uploaded"
    yield from _about_region(bucket, show)
    for name, words in _about_checkpoints(upload):
        show(name, words)


def _rates(bucket: Bucket, names: list[str], scratch: Path) -> tuple[float, float, bool]:
    """Return bytes per second up and down, and whether the same came back."""

    def seconds(action: Callable[[], object]) -> float:
        begun = time.monotonic()
        action()
        return max(time.monotonic() - begun, 1e-6)

    sent = scratch / "sent"
    sent.write_bytes(secrets.token_bytes(_FIRST_BYTES))
    first = seconds(lambda: bucket.send({names[0]: sent}))
    # Most of a short upload is waiting for answers, so that this is on the safe side.
    size = min(_MOST_BYTES, int(_FIRST_BYTES * _SECONDS_OF_UPLOAD / first)) // _FILES
    if size * _FILES < 2 * _FIRST_BYTES:
        names, size, up = names[:1], _FIRST_BYTES, first
    else:
        sent.write_bytes(secrets.token_bytes(size))
        up = seconds(lambda: bucket.send(dict.fromkeys(names, sent)))
    digests: dict[str, str] = {}
    down = seconds(lambda: digests.update(bucket.fetch({name: scratch / name for name in names})))
    is_same = set(digests.values()) == {hashlib.sha256(sent.read_bytes()).hexdigest()}
    return size * len(names) / up, size * len(names) / down, is_same


def _about_checkpoints(bytes_per_second: float) -> Iterator[tuple[str, str]]:
    grace, seconds = GeneralConfig().grace_seconds, CHECKPOINT_BYTES / bytes_per_second
    yield (
        "checkpoint",
        f"GPT-2 (124M) with Adam's state, {CHECKPOINT_BYTES / 1e9:.1f} GB: {_duration(seconds)} to upload",
    )
    yield (
        "spot machine",
        (
            f"has {SPOT_SECONDS} s after its notice, of which --grace-seconds are {grace:.0f}: "
            + ("enough to save its last step" if seconds <= grace else "the updates since the last upload are lost")
        ),
    )
    yield "--save-interval", f"not below {_duration(2 * seconds)} of updates, so that uploads keep up"


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _about_region(bucket: Bucket, show: Callable[[str, str], None]) -> Iterator[str]:
    """A bucket of Google Cloud, and a machine of it."""
    zone, location = machine_zone(), bucket_location(bucket.url)
    if location is None:
        show(
            "region",
            "unknown" if zone is None else f"unknown, and this machine is in {zone}; they should be in one region",
        )
    elif zone is None:
        show("region", f"{location}; where this machine is, is unknown")
    elif location == (region := zone.rpartition("-")[0]):
        show("region", f"{location}, as this machine")
    elif "-" not in location:  # us, eu, asia, nam4, eur4, ...
        show(
            "region",
            f"{location}, which is several; this machine is in {zone}, and a bucket in {region} is the nearest",
        )
    else:
        show("region", f"{location}, but this machine is in {zone}")
        fix = _CREATION["gs"].format(bucket="NAME").replace("REGION", region)
        yield (
            f"the bucket is in {location} and this machine in {zone}: what goes from region to region is slower, and is "
            f'billed (page "Cloud Storage pricing"); {fix}'
        )


def bucket_location(url: str) -> str | None:
    """Return where a bucket of Google Cloud is, such as us-central1 or the multi-region us; None if it is another's, or may
    not be known."""
    files, path = opened(url, "--bucket")
    if not url.startswith(("gs://", "gcs://")):
        return None
    with contextlib.suppress(Exception):  # it takes a right that runs do not need; the client has its own errors
        return str(files.call("GET", "b/{}", path.split("/")[0], json_out=True)["location"]).lower()
    return None


def machine_zone() -> str | None:
    """Return the zone of this machine, such as us-central1-a, if it is one of Google Cloud."""
    host = os.environ.get("GCE_METADATA_HOST")
    with contextlib.suppress(OSError):
        if host is None and "Google" in Path("/sys/class/dmi/id/product_name").read_text():
            host = "169.254.169.254"
    if host is None:
        return None
    with contextlib.suppress(OSError, http.client.HTTPException, UnicodeDecodeError):
        connection = http.client.HTTPConnection(host, timeout=2)
        connection.request("GET", "/computeMetadata/v1/instance/zone", headers={"Metadata-Flavor": "Google"})
        answer = connection.getresponse()
        zone = answer.read().decode().rpartition("/")[2]
        return zone if answer.status == 200 and re.fullmatch(r"[a-z]+-[a-z]+\d+-\w+", zone) else None
    return None


def _fix(url: str, error: str) -> str:
    scheme, _, rest = url.partition("://")
    scheme = {"gcs": "gs", "s3a": "s3"}.get(scheme, scheme)
    for pattern, fixes in _FIXES:
        if re.search(pattern, error, re.IGNORECASE) and scheme in fixes:
            return fixes[scheme].format(bucket=rest.split("/")[0])
    return "check address, credentials and network"


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the block after so many seconds, and KeyboardInterrupt on SIGTERM too."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    handlers: dict[int, Any] = {signal.SIGALRM: ring, signal.SIGTERM: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
