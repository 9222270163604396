"""What the page's server refuses before Gradio reads it: requests by which another web site, or a visitor, could get more
than the page gives."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt2xla.playground import canvas
from gpt2xla.playground.address import Address

_MOST_BYTES = 2 * canvas.MOST_BYTES  # of a request: the largest holds a file of the canvas in base64


class Guard:
    """Passes on requests to `app` that are the page's own.

    A web site may give its own name the address of this machine, and then read what is served here as if it were its own
    (DNS rebinding). So a page for this machine alone answers to this machine's names only. Uploads, which no part of the
    page makes, would be written to disk, whichever site sends them; and requests are held in memory whole."""

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self._app, self._address = app, address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (found := self._refusal(scope["method"], scope["path"], Headers(scope=scope))):
            app = PlainTextResponse(found[1] + "\n", found[0])
        await app(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the reason, or None."""
        if self._address.is_local and not self._is_here(headers.get("host", "")):
            return 403, f"the playground is at {self._address.url}; --host 0.0.0.0 serves it under any name"
        if "upload" in path.split("/"):
            return 403, "the playground takes no files"
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        size = headers.get("content-length", "")
        if not size.isdecimal():
            return 411, "the length of the request is missing"
        return (413, f"a request has at most {_MOST_BYTES:,} bytes") if int(size) > _MOST_BYTES else None

    def _is_here(self, host: str) -> bool:
        """Tell whether the header `Host` names this machine."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self._address.host.lower()) or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
