"""Pre-train GPT-2 with plain PyTorch: `python run_pretrain.py ...`, or several GPUs through `torchrun`."""

from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig


def main() -> None:
    config, options = parse_run(TorchConfig)
    config.check_early()
    # Imported after parsing, so that --help and wrong flags answer at once.
    from gpt2xla.processes.signals import StopSignals
    from gpt2xla.runtime.torch.runtime import TorchRuntime
    from gpt2xla.training.pretrain import pretrain

    with StopSignals() as signals:
        pretrain(config, lambda train: TorchRuntime(options, train), signals)
