"""Writes metrics as an event file, which TensorBoard shows. Its package, the extra `tensorboard`, is needed here only, and
TensorFlow is not: where that is installed it is not imported, for it would take the devices."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from gpt2xla.logs.background_sink import BackgroundSink
from gpt2xla.logs.sinks import METRICS_FILE, TENSORBOARD_FOLDER

_EVENTS = "events.out.tfevents."  # TensorBoard reads files with this in their names, in the order of these
_GROUPS = {"valid_": "valid/", "hellaswag_": "hellaswag/", "sketch_": "sketches/"}
_LEFT_OUT = ("step", "time")  # which every event has


class TensorBoardSink(BackgroundSink):
    """Writes every line to an event file in the folder `tensorboard` of the run's folder.

    metrics.jsonl is the truth. Each start of a run writes a new event file, first with the lines that metrics.jsonl has
    kept, then with the new ones. So a resumed run has each step once, whatever a crash left, and the steps before this sink
    was asked for too. Of the older files one is left: a TensorBoard that is open finds the new one after it.

    Args:
        folder: the run's folder. Nothing has been added to its metrics.jsonl yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__("TensorBoard")
        self._run, self._metrics, self._folder = folder, folder / METRICS_FILE, folder / TENSORBOARD_FOLDER
        self._kept = self._metrics.stat().st_size  # bytes
        self._time = time.time()  # of the newest event; evaluations have none of their own
        self._start()

    def _send(self) -> None:
        self._folder.mkdir(exist_ok=True)
        older = sorted(self._folder.glob(f"{_EVENTS}*"))
        with (self._folder / f"{_EVENTS}{time.time_ns() / 1e9:020.9f}.{os.getpid()}").open("wb") as file:
            self._begin(file)
            with self._metrics.open("rb") as metrics:
                for text in metrics.read(self._kept).splitlines():
                    self._write(file, json.loads(text))
            file.flush()
            for one in older[:-1]:
                one.unlink(missing_ok=True)
            for line in self._lines():
                self._write(file, line)
                file.flush()

    def _begin(self, file: IO[bytes]) -> None:
        """Write what makes TensorBoard forget the older files, from step 0 on."""
        self._add(file, file_version="brain.Event:2")
        self._add(file, step=0, session_log=SessionLog(status=SessionLog.START))

    def _write(self, file: IO[bytes], line: dict[str, Any]) -> None:
        self._time = line.get("time") or self._time
        values = [self._value(line, name, value) for name, value in line.items()]
        self._add(file, step=line["step"], summary=Summary(value=[value for value in values if value]))

    def _value(self, line: dict[str, Any], name: str, value: Any) -> Any:
        if name == "sample":
            return _text(value)
        return _picture(self._run / value) if name == "sketches" else _scalar(line, name, value)

    def _add(self, file: IO[bytes], **event: Any) -> None:
        RecordWriter(file).write(Event(wall_time=self._time, **event).SerializeToString())


def _scalar(line: dict[str, Any], name: str, value: float | None) -> Any:
    """Return a number of the line as a protocol buffer; None if it is unknown, or belongs to the line as a whole."""
    is_training = "loss" in line
    if name in _LEFT_OUT or (name == "tokens" and not is_training) or value is None or not math.isfinite(value):
        return None
    return Summary.Value(tag=tag_of(name), simple_value=value)


def tag_of(name: str) -> str:
    """Return what TensorBoard calls a key of metrics.jsonl: `loss` -> `train/loss`, `valid_loss` -> `valid/loss`."""
    for prefix, group in _GROUPS.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"


def _text(sample: str) -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    # Shown as Markdown: the indentation keeps its lines as they are.
    text = "".join(f"    {line}\n" for line in sample.splitlines())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    return Summary.Value(tag="sample", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def _picture(file: Path) -> Any:
    """Return a PNG as a protocol buffer; None if it is no longer there."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    with Image.open(file) as picture:
        width, height = picture.size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    return Summary.Value(tag="sketches/drawn", image=image)
