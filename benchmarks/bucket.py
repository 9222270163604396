"""What sending checkpoints to a bucket costs: `python benchmarks/bucket.py [rate] [steps]`.

rate: a checkpoint of GPT-2 (124M) with Adam's moments, 1.5 GB, to an S3 server on this machine, against a plain copy of the
same files by the same library, in turns; and the memory that an upload holds.
steps: the median step of one run while checkpoints are being sent, 30 MB/s a file, against the other steps of that run.

It needs the development install, whose object server the tests use."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.object_server import object_server  # noqa: E402

PARAMETERS = 124_439_808
TURNS = 3
BYTES_PER_SECOND = 30e6  # of each connection


def main() -> None:
    asked = sys.argv[1:] or ["rate", "steps"]
    with tempfile.TemporaryDirectory() as folder:
        if "rate" in asked:
            rate(Path(folder))
        if "steps" in asked:
            steps(Path(folder))


def rate(folder: Path) -> None:
    from gpt2xla.checkpoint.bucket.mirror import send_whole
    from gpt2xla.checkpoint.seal import seal
    from gpt2xla.storage import Bucket, opened

    checkpoint = folder / "step-00001000"
    checkpoint.mkdir()
    for name, size in (("model.safetensors", 4 * PARAMETERS), ("training_state.pt", 8 * PARAMETERS)):
        with (checkpoint / name).open("wb") as file:
            for start in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - start)))
    seal(checkpoint, 1000)
    files = [file for file in checkpoint.iterdir() if file.name != "COMPLETE"]
    size = sum(file.stat().st_size for file in files)
    with object_server() as server, server.reached_from_here():
        bucket = Bucket(server.url, "--checkpoints-dir")
        library, path = opened(server.at("copy"), "--checkpoints-dir")

        def ours() -> None:
            send_whole(bucket, checkpoint)

        def plain() -> None:
            library.put([str(file) for file in files], [f"{path}/{file.name}" for file in files])

        def empty() -> None:
            bucket.remove(bucket.files())
            library.rm(path, recursive=True) if library.exists(path) else None

        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        held: dict[str, int] = {"ours": 0, "plain": 0}
        for turn in range(TURNS + 1):
            for name, send in (("ours", ours), ("plain", plain))[:: 1 if turn % 2 else -1]:
                empty()
                taken, more = measured(send)
                if turn:  # the first one warms up
                    seconds[name].append(taken)
                    held[name] = max(held[name], more)
        ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
        for name in seconds:
            rates = [size / 1e6 / taken for taken in seconds[name]]
            print(
                f"{name}: {statistics.median(rates):.0f} MB/s (from {min(rates):.0f} to {max(rates):.0f}), at most "
                f"{held[name] / 1e6:.0f} MB more in memory"
            )
        print(
            f"our rate to the plain one: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}), "
            f"{TURNS} turns of {size / 1e9:.2f} GB"
        )


def measured(action: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds of `action`, and by how many bytes this process grew meanwhile."""
    before, most, is_over = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.02):
            most = max(most, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    action()
    taken = time.perf_counter() - begun
    is_over.set()
    watcher.join()
    return taken, most - before


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def steps(folder: Path) -> None:
    import numpy as np

    for split, count in (("train", 400_000), ("test", 20_000)):
        (folder / split).mkdir()
        tokens = np.random.default_rng(0).integers(0, 5000, count).astype(np.uint16)
        np.save(folder / split / "000.npy", tokens)
    with object_server() as server:
        server.slow(BYTES_PER_SECOND)  # at full rate the server itself would take the cores from training
        flags = ["--train-dir", folder / "train", "--valid-dir", folder / "test", "--vocab-size", 5000]
        flags += ["--seq-length", 128, "--d-model", 384, "--num-layers", 6, "--num-heads", 6, "--train-batch-size", 2]
        flags += ["--gradient-accum-step", 1, "--train-steps", 400, "--valid-interval", 0, "--valid-steps", 1]
        flags += ["--save-interval", 20, "--saved-checkpoint-limit", 2]
        flags += ["--checkpoints-dir", server.url, "--scratch-dir", folder / "scratch"]
        environment = os.environ | server.environment | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, ROOT / "run_pretrain.py", *map(str, flags)], env=environment, check=True, cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lines = [json.loads(line) for line in (server.read("run/metrics.jsonl") or b"").splitlines()]
        uploads = [json.loads(line) for line in (server.read("run/uploads.jsonl") or b"").splitlines()]
    spans = [(line["time"] - line["seconds"], line["time"]) for line in uploads]
    trained = [line for line in lines if "loss" in line]
    during, other = [], []
    for before, line in itertools.pairwise(trained[10:]):
        if before["step"] % 20 == 0:
            continue  # between them lies a save's copy to host memory
        is_during = any(begin < line["time"] and before["time"] < end for begin, end in spans)
        (during if is_during else other).append(line["time"] - before["time"])
    shown = [f"{1e3 * statistics.median(part):.1f} ms ({len(part)} steps)" for part in (during, other)]
    print(
        f"median step while a checkpoint of {uploads[-1]['bytes'] / 1e6:.0f} MB is sent: {shown[0]}; otherwise {shown[1]}"
    )
    print(f"ratio: {statistics.median(during) / statistics.median(other):.3f}")


if __name__ == "__main__":
    main()
