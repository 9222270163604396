"""An object store on this machine, as a process of its own, with faults on demand.

    with object_server("s3") as server:  # or "gs"
        server.fail(503, times=3, method="PUT", key="*/COMPLETE")
        subprocess.run([..., "--checkpoints-dir", server.url], env=os.environ | server.environment)
        assert "run/latest" in server.objects()

S3 is moto's, GCS is gcp-storage-emulator: programs reach them with s3fs and gcsfs as they reach the real ones. A test looks
at the objects and sets faults through `server` itself: fsspec's file systems must not be used in a process that forks later.

`front.py` takes the connections and does the faults, `faults.py` says which are due, `s3.py` and `gcs.py` hold the stores,
and `client.py` is the side of the test.
"""

from .client import ObjectServer, Request, object_server

__all__ = ["ObjectServer", "Request", "object_server"]
