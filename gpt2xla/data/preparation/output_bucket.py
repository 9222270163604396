"""A folder behind a URL that a preparation makes: shards are sent as soon as they are complete, then removed here.

The object store is the truth: what is left on a disk is never read again, so another machine resumes as this one does. Below
`.partial` lies the record of the preparation. It is replaced each time after shards were sent, at the next end of a block,
so it counts only shards that are there. The tokens of a shard that is not complete lie beside it, in pieces: each holds what
came since the last record. Of train/ that is the rest of a block; of test/, which has one shard or few, it is the share of
a train/ shard. So everything is sent about once, and a resumed preparation repeats at most what is written between two
records, with the same bytes under the same names. At the end tokenizers, then manifests, then the record get their
names: without its manifest no split is read.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.config.paths import is_url
from gpt2xla.data.documents.corpus import Split
from gpt2xla.data.preparation.output_folder import OutputFolder, in_use, manifests_in
from gpt2xla.data.preparation.record import RECORD, SPLITS, Record
from gpt2xla.data.preparation.sending import MOST_UNSENT, Sender
from gpt2xla.data.preparation.writer import ShardWriter, Written
from gpt2xla.data.shard_files.mask_file import mask_of
from gpt2xla.data.shards import MANIFEST, Manifest
from gpt2xla.errors import InputError, RunFailed, in_one_line, name_copy
from gpt2xla.files import folder_name
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.processes.lease import Lease, held
from gpt2xla.storage import Bucket

_PARTIAL = ".partial"
_RECORD = f"{_PARTIAL}/{RECORD}"
_PIECE_BYTES = 16 << 20  # in memory at a time


def output_of(output_dir: str, scratch_dir: str, say: Callable[[str], None]) -> OutputFolder:
    """Return the output that --output-dir names. `say` receives notes. Raises InputError if a URL cannot be opened."""
    return OutputBucket(output_dir, scratch_dir, say) if is_url(output_dir) else OutputFolder(output_dir)


class _Piece(NamedTuple):
    """Some of the tokens of a shard that is not complete: those from `start` on, up to `end`."""

    split: Split
    shard: int
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{_PARTIAL}/{self.split}-{self.shard:06d}/{self.start}-{self.end}"


class OutputBucket(OutputFolder):
    """A folder behind a URL. What is written lies in a folder of `scratch_dir` until it is sent.

    Methods raise RunFailed if the storage fails or refuses, also for what was sent in the background."""

    def __init__(self, url: str, scratch_dir: str, say: Callable[[str], None]) -> None:
        self.name = url.rstrip("/")
        self.what, self.place = f"--output-dir {self.name}", f"--scratch-dir {scratch_dir}"
        self.partial = Path(scratch_dir).expanduser() / folder_name(self.name)
        name_copy(self.partial, self.name)
        self._say = say
        self._bucket = Bucket(self.name, "--output-dir")
        self._first_record: str | None = None  # until it is sent
        self._pieces: list[_Piece] = []  # what the newest record counts
        self._has_new_shards = False
        self._sender: Sender
        self._lease: Lease

    def of(self, split: str) -> str:
        return f"{self.name}/{split}"

    def finished(self) -> Record | None:
        with self._reaching():
            content = self._bucket.read(RECORD)
            if content is None:
                return None
            self._clear()  # a process may have been killed before it came to that
        return Record.parse(content, self.of(RECORD))

    def check(self, split: Split, holds: str) -> None:
        names = [holds]
        if holds == MANIFEST and (manifest := self.manifests().get(split)):
            names += [shard.file for shard in manifest.shards]
            names += [mask_of(shard.file) for shard in manifest.shards if shard.mask_sha256]
        with self._reaching():
            self._refuse_missing(split, names)

    def manifests(self) -> dict[Split, Manifest]:
        with self._reaching(), tempfile.TemporaryDirectory() as folder:
            for split in SPLITS:
                if (content := self._bucket.read(f"{split}/{MANIFEST}")) is not None:
                    (Path(folder) / split).mkdir()
                    (Path(folder) / split / MANIFEST).write_bytes(content)
            return manifests_in(Path(folder))

    @contextlib.contextmanager
    def being_prepared(self, effect: str = "") -> Iterator[Path]:
        """As `OutputFolder.being_prepared`, and hold the URL's lease, so that no other machine prepares it meanwhile."""
        with in_use(self.partial, self.what, self.place, effect), self._reaching():
            leases = Bucket(self.of(_PARTIAL), "--output-dir")
            # It survives `partial`: the next process here knows our lease by it if it could not be released.
            taken = self.partial.with_name(f"{self.partial.name}.lease")
            with held(leases, self.what, taken, self._say) as self._lease:
                if self._bucket.read(RECORD) is not None:
                    raise InputError(f"{self.what}: another process has just prepared it; give the same command again")
                self._sender = Sender(self._bucket)
                try:
                    yield self.partial
                finally:
                    self._sender.stop()
            self._clear([_RECORD, *(piece.name for piece in self._pieces)])
            taken.unlink()

    def refuse_other_splits(self) -> None:
        for split in SPLITS:
            if self._bucket.files(split):
                raise self._other(split)

    def check_room(self, all: float, shard: int) -> None:
        needed = min(all, shard * (MOST_UNSENT + 1))
        self._refuse_full(needed, "the shards that wait to be sent", "a smaller --shard-size")

    def begin(self, record: Record) -> None:
        self._first_record = record.as_text(pieces=[])

    def unfinished(self) -> Record | None:
        """As `OutputFolder.unfinished`. What is left on this machine is removed."""
        (self.partial / RECORD).unlink(missing_ok=True)
        for split in SPLITS:
            shutil.rmtree(self.partial / split, ignore_errors=True)
        if (content := self._bucket.read(_RECORD)) is None:
            return None
        record = Record.parse(content, self.of(_RECORD))
        self._pieces = [_Piece(*values) for values in json.loads(content)["pieces"]]
        return record

    def restore(self, record: Record, dtype: np.dtype, shard_size: int) -> None:
        for split, written in record.splits.items():
            self._refuse_missing(split, [shard.file for shard in written.shards])
            writer = ShardWriter(self.partial / split, dtype, shard_size, Written(list(written.shards)))
            for piece in self._pieces:
                if piece.split == split:
                    content = self._bucket.read(piece.name)
                    if content is None or len(content) != (piece.end - piece.start) * dtype.itemsize:
                        raise self._damaged(piece.name)
                    writer.add(np.frombuffer(content, dtype), 0, 0)
            if writer.written.filled != written.filled:
                raise self._damaged(_RECORD)
            writer.save()

    def closed(self, split: Split, shard: Path) -> None:
        self._send_first_record()
        self._sender.send(f"{split}/{shard.name}", shard)
        self._has_new_shards = True

    @property
    def is_record_due(self) -> bool:
        self._sender.check()
        return self._has_new_shards

    def save(self, record: Record, writers: Mapping[Split, ShardWriter]) -> None:
        pieces: list[_Piece] = []
        for split, writer in writers.items():
            writer.save()
            shard, size = len(writer.written.shards), writer.dtype.itemsize
            pieces += (sent := [piece for piece in self._pieces if (piece.split, piece.shard) == (split, shard)])
            most = max(1, _PIECE_BYTES // size)
            for start in range(sent[-1].end if sent else 0, writer.written.filled, most):
                piece = _Piece(split, shard, start, min(start + most, writer.written.filled))
                first, count = writer.data_start + start * size, (piece.end - start) * size
                # It can be read later: the file only grows, until it is sent and removed after this.
                self._sender.then(partial(self._send_piece, piece.name, writer.path, first, count))
                pieces.append(piece)
        former = [piece.name for piece in self._pieces if piece not in pieces]
        self._sender.then(partial(self._send_record, record.as_text(pieces=pieces), former))
        self._pieces, self._has_new_shards = pieces, False

    def has(self, split: Split) -> bool:
        return False

    def publish(self) -> dict[Split, Manifest]:
        """Send what is left, and at last manifests and record. Return the manifests."""
        self._send_first_record()
        self._sender.finish()
        for split in SPLITS:
            files = [file for file in sorted((self.partial / split).rglob("*")) if file.is_file()]
            named = {file.relative_to(self.partial).as_posix(): file for file in files if file.name != MANIFEST}
            self._bucket.send(named)
        self._lease.check()
        manifests = manifests_in(self.partial)
        # Whoever trains on half of it would need train/.
        for split in sorted(manifests):
            self._bucket.write(f"{split}/{MANIFEST}", (self.partial / split / MANIFEST).read_bytes())
        self._bucket.write(RECORD, (self.partial / RECORD).read_bytes())
        (self.partial / RECORD).unlink()
        return manifests

    def _send_first_record(self) -> None:
        """Have a record in the bucket before anything else: it says whose shards they are."""
        if self._first_record is not None:
            self._sender.then(partial(self._send_record, self._first_record, []))
            self._first_record = None

    def _send_record(self, text: str, former: Sequence[str]) -> None:
        self._lease.check()
        self._bucket.write(_RECORD, text.encode())
        self._bucket.remove(former)

    def _send_piece(self, name: str, file: Path, first: int, count: int) -> None:
        with file.open("rb") as stream:
            stream.seek(first)
            self._bucket.write(name, stream.read(count))

    def _refuse_missing(self, split: Split, names: Sequence[str]) -> None:
        """Raise InputError if one of a split's objects is not there."""
        listed = self._bucket.files(split)
        for name in (f"{split}/{name}" for name in names):
            if name not in listed and not self._is_there(name):
                raise InputError(f"{self.what}: {name} is missing there")

    def _is_there(self, name: str) -> bool:
        """Whether there is an object that a store may list late."""
        try:
            return self._bucket.modified(name) is not None
        except FileNotFoundError:
            return False

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.what}: {name} is missing or damaged; remove all that is there and prepare again")

    def _clear(self, known: Sequence[str] = ()) -> None:
        """Remove what only an unfinished preparation needs. `known` may be listed late."""
        self._bucket.remove(sorted({*known, *self._bucket.files(_PARTIAL)}))

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise
            problem = in_one_line(error)
            if isinstance(error, FileNotFoundError) and error.errno is None:  # of a storage, not of this machine
                raise InputError(f"{self.what}: {problem}; check the address") from None
            kept = "what was sent is kept: give the same command again, which resumes"
            raise RunFailed(f"{problem}; {kept}") from None
