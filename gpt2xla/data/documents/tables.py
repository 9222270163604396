"""Documents in a column of parquet and Arrow files, or whole rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from gpt2xla.data.documents import compression
from gpt2xla.errors import InputError

_ROWS_AT_ONCE = 64
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: Path, name: str, column: str | None) -> Iterator[pa.Array]:
    """Yield the column's values, some rows at a time; without a column, the rows. Raises InputError if it holds no text."""
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
        _check_column(name, column, table.schema_arrow)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=None if column is None else [column]):
            yield _chosen(batch, column)


def read_arrow(file: Path, layers: tuple[str, ...], name: str, column: str | None) -> Iterator[pa.Array]:
    """Yield the same from an Arrow stream, which may be compressed, or an Arrow file (Feather version 2).

    Raises InputError also if a stream is cut off between two batches, unnoticed by Arrow, or followed by more.
    """
    if layers:
        with compression.opened(file, layers) as source:
            yield from _batches(source, name, column)
            is_whole = not source.read(1)
        with compression.opened(file, layers) as source:
            _check_end(_last_bytes(source), is_whole, name)
        return
    with pa.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            with pyarrow.ipc.open_file(source) as table:
                _check_column(name, column, table.schema)
                for number in range(table.num_record_batches):
                    yield _chosen(table.get_batch(number), column)
            return
        source.seek(0)
        yield from _batches(source, name, column)
        is_whole = not source.read(1)
        source.seek(-min(len(_END_OF_STREAM), source.size()), io.SEEK_END)
        _check_end(source.read(), is_whole, name)


def _batches(source: pa.NativeFile, name: str, column: str | None) -> Iterator[pa.Array]:
    with pyarrow.ipc.open_stream(source) as batches:
        _check_column(name, column, batches.schema)
        for batch in batches:
            yield _chosen(batch, column)


def _chosen(batch: pa.RecordBatch, column: str | None) -> pa.Array:
    return batch.to_struct_array() if column is None else batch.column(column)


def _last_bytes(source: pa.NativeFile) -> bytes:
    last = b""
    while chunk := source.read(1 << 20):
        last = (last + chunk)[-len(_END_OF_STREAM) :]
    return last


def _check_end(last: bytes, is_whole: bool, name: str) -> None:
    if last != _END_OF_STREAM or not is_whole:
        state = "has no end: it is cut off" if is_whole else "holds more after the end of its Arrow stream"
        raise InputError(f"{name} {state}; copy or make it again")


def _check_column(name: str, column: str | None, schema: pa.Schema) -> None:
    if column is None:
        return
    texts = [field.name for field in schema if _holds_text(field.type)]
    if schema.names.count(column) > 1:
        raise InputError(f"{name} has {schema.names.count(column)} columns {column!r}; give each its own name")
    if column in texts:
        return
    if column in schema.names:
        kind = str(schema.field(column).type)
        held = f"column {column!r} holds {kind[:60]}{'...' * (len(kind) > 60)}, not text"
    else:
        held = f"no column {column!r} but {', '.join(schema.names)}"
    fix = f"text is in {', '.join(texts)}; choose with --text-column" if texts else "no column holds text"
    raise InputError(f"{name}: {held}; {fix}")


def _holds_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds text: Arrow would silently turn numbers and dates into text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)
