"""How much host memory starting from a Hugging Face checkpoint takes: `python benchmarks/load_memory.py --size gpt2-xl`.

A folder of the size's shape with random weights is written once, and loaded in a process of its own by the code that
--from-checkpoint runs.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of loading a checkpoint.")
    parser.add_argument("--size", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), default="gpt2-xl")
    parser.add_argument("--flags", default="", help="further options of the run, such as '--vocab-size 50304'")
    parser.add_argument("--load", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.flags.split())
        return
    with tempfile.TemporaryDirectory(prefix="gpt2xla-") as folder:
        write_random_checkpoint(Path(folder), options.size)
        # Another process, so that writing leaves no mark on the peak.
        command = [sys.executable, __file__, "--load", folder, f"--flags={options.flags}"]
        subprocess.run(command, check=True)


def load(folder: str, flags: list[str]) -> None:
    from gpt2xla.checkpoint.start import find_start
    from gpt2xla.cli import parse_run
    from gpt2xla.config import TorchConfig

    config, _ = parse_run(TorchConfig, ["--from-checkpoint", folder, "--checkpoints-dir", f"{folder}/run", *flags])
    before, began = peak(), time.perf_counter()
    model = find_start(config).build_model()
    seconds = time.perf_counter() - began
    file = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    print(
        f"{model.num_parameters():,} parameters; file {file / GIB:.2f} GiB; peak memory {peak() / GIB:.2f} GiB, of which "
        f"{before / GIB:.2f} GiB before loading: {(peak() - before) / file:.2f} of the file; {seconds:.1f} s"
    )


def peak() -> int:
    """Most bytes this program had resident so far, mapped files included. (getrusage counts those of its parent, too.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def write_random_checkpoint(folder: Path, size: str) -> None:
    """In safetensors' format (a length, a JSON header, the numbers), tensor by tensor, as memory may not hold it twice."""
    import torch

    from gpt2xla.checkpoint.formats.hf_config import to_hf_config
    from gpt2xla.checkpoint.formats.parameter_names import to_hf_state
    from gpt2xla.config import PRESETS, ModelConfig
    from gpt2xla.model.gpt2 import GPT2

    config = ModelConfig(**PRESETS[size])
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    with torch.device("meta"):
        state = to_hf_state(config, GPT2(config).state_dict())
    header, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            file.write((0.02 * random.standard_normal(tensor.numel(), dtype=np.float32)).tobytes())


if __name__ == "__main__":
    main()
