"""Errors of stores and their clients. tests/object_server/ tests `Bucket` against stores."""

from __future__ import annotations

import botocore.exceptions
import google.auth.exceptions
import pytest
from gcsfs.retry import HttpError

from gpt2xla import storage


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


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(code: int) -> None:
    assert not storage.is_final(HttpError({"code": code, "message": "busy"}))
    assert not storage.is_final(OSError(5, "Input/output error"))
