"""The process of the server: `python -m tests.object_server s3|gs BUCKET`. It prints its port, and ends with its input."""

from __future__ import annotations

import sys
import threading

from .front import Front
from .store import Clock, Store


def main() -> None:
    kind, bucket = sys.argv[1:]
    clock = Clock()
    store: Store
    if kind == "s3":
        from .s3 import S3

        store = S3(bucket, clock)
    else:
        from .gcs import GCS

        store = GCS(bucket, clock)
    front = Front(store, clock)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    print(front.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
