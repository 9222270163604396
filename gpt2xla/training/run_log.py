"""The lines of a run: one for each update and each evaluation, and when updates without a finite loss end it."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from typing import Any

from gpt2xla.checkpoint.start import Start
from gpt2xla.config import TrainConfig
from gpt2xla.data.opening import TrainingData
from gpt2xla.data.windows import TrainingOrder, validation_windows
from gpt2xla.errors import RunFailed
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import METRICS_FILE, ConsoleSink, JsonlSink, Sink
from gpt2xla.logs.throughput import Throughput
from gpt2xla.logs.wandb_sink import WandbSink
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop
from gpt2xla.training.time_left import TimeLeft

_MOST_OVERFLOWS = 40  # in a row: as many halvings take fp16's first scale from 65536 to 6e-8


class RunLog:
    """Writes a run's lines to its sinks, which only the main process has. `open` makes it."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        order: TrainingOrder,
        tokens: Callable[[int], int],
        throughput: Throughput,
        time_left: TimeLeft,
        stop: Stop,
        skipped: int = 0,
    ) -> None:
        self.config, self.runtime, self.order, self.tokens = config, runtime, order, tokens
        self.throughput, self.time_left, self.stop = throughput, time_left, stop
        self.skipped = skipped  # updates left out so far because their loss or gradient was not finite
        self.sinks: list[Sink] = []
        self._wandb: WandbSink | None = None
        self._overflows = 0  # in a row

    @classmethod
    def open(cls, start: Start, runtime: Runtime, data: TrainingData, flops_per_token: int, stop: Stop) -> RunLog:
        """Open the sinks that the options of `start` name. A resumed run continues the files and the wandb run."""
        config, folder, saved = start.config, start.config.general.folder, start.training or {}
        throughput = Throughput(flops_per_token, runtime.peak_flops())
        time_left = _time_left(start, data, throughput)
        skipped = saved.get("skipped", 0)
        log = cls(config.train, runtime, data.order, data.tokens_after, throughput, time_left, stop, skipped)
        if runtime.is_main:
            log.sinks.append(JsonlSink(folder / METRICS_FILE, start.step, start.is_evaluated))
            pace, best = throughput.pace, (start.best.step, start.best.loss)
            log.sinks.append(ConsoleSink(start.step, config.train.train_steps, pace, log._seconds_left, best))
            if config.general.tensorboard_logging:
                from gpt2xla.logs.tensorboard_sink import TensorBoardSink  # an extra

                log.sinks.append(TensorBoardSink(folder))
            if config.wandb.wandb_logging:
                log._wandb = WandbSink(config, folder, saved.get("wandb_id"))
                log.sinks.append(log._wandb)
        return log

    def _seconds_left(self) -> float | None:
        """Return the expected time to the end, or to the time limit if that comes first."""
        seconds = self.time_left.seconds()
        return None if seconds is None else min(seconds, self.stop.seconds_left)

    def state(self) -> dict[str, Any]:
        """What a resumed run's log needs: plain values for the checkpoint."""
        return {"wandb_id": self._wandb.run_id if self._wandb else None, "skipped": self.skipped}

    def training_line(self, step: int, lr: float) -> Callable[[float, float], None]:
        """Return, inside step number `step` (from 1), what receives its loss and gradient norm once the device has them."""
        trace_ms = self.runtime.watch.trace_ms()

        def log(loss: float, grad_norm: float) -> None:
            self._count_skipped(step, loss, grad_norm)
            measured = self.throughput.step(
                self.tokens(step) - self.tokens(step - 1), is_first=self.order.plan.at(step - 1).from_step == step - 1
            )
            values = {
                "loss": loss, "lr": lr, "grad_norm": grad_norm, **measured,
                "compiles": self.runtime.watch.programs(), "trace_ms": trace_ms, "skipped": self.skipped,
                "time": time.time(),
            }  # fmt: skip
            self.time_left.step(step)
            self._write(step, values)
            expected = self.time_left.expected_end(self.stop.seconds_left, datetime.datetime.now())
            if expected and self.runtime.is_main:
                say(expected)

        return log

    def evaluation_line(self, step: int, values: dict[str, Any]) -> None:
        """Log the result of an evaluation after `step`."""
        self._write(step, values)
        self.time_left.evaluation(next(iter(values)), self.throughput.restart())

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        line = {"step": step, "tokens": self.tokens(step)} | values
        for sink in self.sinks:
            sink.write(line)

    def _count_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """End the run when more updates were skipped than --skip-nonfinite allows.

        All processes see the same values, so all fail at the same step. A save waits until all earlier steps are counted, so
        nothing is saved afterwards. With fp16 the scaler skips an update whose gradient overflowed, which is normal, and
        halves its scale; only after many of them in a row is something else wrong."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._overflows = 0
            return
        self._overflows += 1
        is_fp16 = self.config.mixed_precision == "fp16"
        if math.isfinite(loss) and is_fp16 and self._overflows <= _MOST_OVERFLOWS:
            return
        self.skipped += 1
        if self.skipped > self.config.skip_nonfinite:
            raise RunFailed(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: the run has diverged. It read "
                f"{self.order.describe(step - 1)}. This update was not made, and earlier checkpoints are good: start again "
                "with a lower --learning-rate, resume an earlier checkpoint with --resume, or allow more skipped updates "
                "with --skip-nonfinite"
            )


def _time_left(start: Start, data: TrainingData, throughput: Throughput) -> TimeLeft:
    train = start.config.train
    intervals: dict[str, Any] = {"valid_loss": train.valid_interval, "hellaswag_acc": train.hellaswag_interval}
    intervals |= {"sample": train.sample_interval, "sketch_top1": train.sketches_interval}
    # A forward pass is a third of the arithmetic of an update.
    windows = validation_windows(data.validation, train.eval_batch_size, train.valid_steps)
    validation = windows * data.validation.seq_length / 3
    return TimeLeft(start.step, train.train_steps, data.tokens_after, throughput, intervals, validation)
