"""Errors of stores and their clients. tests/object_server/ tests `Bucket` against stores."""

from __future__ import annotations

from pathlib import Path

import botocore.exceptions
import google.auth.exceptions
import pytest
from gcsfs.retry import HttpError

from gpt2xla import storage
from gpt2xla.errors import InputError


@pytest.mark.parametrize(
    "error",
    [
        HttpError({"code": 401, "message": "Invalid Credentials"}),
        OSError("Forbidden: https://storage.googleapis.com/b/bucket"),
        google.auth.exceptions.RefreshError("Reauthentication is needed"),
        google.auth.exceptions.DefaultCredentialsError("no credentials"),
        botocore.exceptions.NoCredentialsError(),
        PermissionError("ExpiredToken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_storage_refuses_is_not_asked_again(error: Exception) -> None:
    assert storage.is_final(error)


@pytest.mark.parametrize("code", [404, 405, 501])
def test_a_web_server_that_takes_no_files_is_not_asked_again(code: int) -> None:
    assert storage.is_final(HttpError({"code": code, "message": "not here"}))


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match=r"--x S3://bucket/run: there is no S3://; write gs://"):
        storage.Bucket("S3://bucket/run", "--x")


def test_a_folder_of_this_machine_goes_with_its_last_file(tmp_path: Path) -> None:
    bucket = storage.Bucket(f"file://{tmp_path}/run", "--x")
    for name in ("step/a", "step/b"):
        bucket.write(name, b"")
    bucket.remove(["step/a"])
    assert bucket.files() == {"step/b": 0}
    bucket.remove(["step/b", "step/c"])
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(code: int) -> None:
    assert not storage.is_final(HttpError({"code": code, "message": "busy"}))
    assert not storage.is_final(OSError(5, "Input/output error"))
