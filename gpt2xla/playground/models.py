"""The models that the page offers: those that the command line names, and each checkpoint of a run. No other is opened."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from gpt2xla.chat.template import ChatTemplate
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.checkpoint.run_folder import LATEST, best_of, list_checkpoints, step_folder
from gpt2xla.config import ModelConfig, Precision
from gpt2xla.data.tokenizer import Tokenizer, find_tokenizer
from gpt2xla.data.tokenizer_folder import model_folder
from gpt2xla.errors import InputError
from gpt2xla.generation.devices import move
from gpt2xla.generation.dialogue import ChatReader
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.sketches.format import SketchFormat


class Thread:
    """A thread that does one thing after another until the process ends, in whatever it is then."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="models", daemon=True).start()

    def do(self, work: Callable[[], None]) -> None:
        """Do `work`, which must not raise, after all that was given before. Returns at once."""
        self._work.put(work)

    def _run(self) -> None:
        while True:
            self._work.get()()


@dataclass(frozen=True)
class Opened:
    """A model in memory, with all that belongs to it.

    Attributes:
        folder: the folder or file that it was loaded from.
        chat: makes prompts of conversations; None if the model was not trained to chat.
        sketches: how it writes drawings; None if it was not trained on any."""

    name: str
    folder: Path
    model: GPT2
    device: Device
    tokenizer: Tokenizer
    config: ModelConfig
    settings: GenerationSettings
    chat: ChatReader | None
    sketches: SketchFormat | None


class Models:
    """Models by the names that the page shows. One at a time is in memory.

    Attributes:
        runs: the named folders of checkpoints, by the names that the page shows.
        any_chats: whether one of the models was trained to chat.
        any_draws: whether one was trained on sketches.
        thread: in it all work on models is done: threads of OpenMP, CUDA and XLA belong to the thread that made them."""

    def __init__(self, named: Sequence[str], tokenizer: str | None, device: str, precision: Precision) -> None:
        """Find what the command line names, and check all but the weights' values. Raises InputError."""
        self._asked, self._device, self._precision = tokenizer, device, precision
        self.runs: dict[str, Path] = {}
        self._alone: dict[str, Path] = {}  # models that are not in one of `runs`
        self._lock = threading.Lock()
        self._current: Opened | None = None
        self.thread = Thread()
        self._tokenizer_of = lru_cache(maxsize=64)(self._find_tokenizer)
        tokenizers: list[Tokenizer] = []
        for name, label in _labels(named).items():
            source, root = locate(name), Path(name)
            if root.is_dir() and source != root and source in list_checkpoints(root):
                self.runs[label] = root
            else:
                self._alone[label] = source
            tokenizers.append(self._tokenizer_of(source))
        self.any_chats = any(map(_has_template, tokenizers))
        self.any_draws = any(tokenizer.sketches is not None for tokenizer in tokenizers)

    def names(self) -> list[str]:
        """Return the names of the models there are now: a run that is training adds checkpoints."""
        return [*self._all()]

    def words(self, name: str) -> tuple[str, ...]:
        """Return the words of the sketches that a model was trained on; none if there were no sketches, or no such model."""
        with contextlib.suppress(InputError):
            if (sketches := SketchFormat.of(self._tokenizer_of(self._find(name)))) is not None:
                return sketches.words
        return ()

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Opened]:
        """Load a model, unless it is in memory, and keep it there inside the block. Raises InputError if `name` is none of
        `names`, or it cannot be loaded."""
        with self._lock:
            source = self._find(name)
            if self._current is None or self._current.folder != source:
                self._current = None
                gc.collect()  # before the next one takes memory
                self._current = self._load(name, source)
            yield self._current

    def _all(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for label, root in self.runs.items():
            checkpoints, best = list_checkpoints(root), best_of(root)
            if checkpoints:
                found[f"{label}@{LATEST}"] = checkpoints[-1]
            if best and (folder := step_folder(root, best[0])) in checkpoints:
                found[f"{label}@best"] = folder
            found |= {f"{label}/{folder.name}": folder for folder in reversed(checkpoints)}
        return found | self._alone

    def _find(self, name: str) -> Path:
        try:
            return self._all()[name]
        except KeyError:
            raise InputError(f"there is no model {name[:80]!r} here; choose another") from None

    def _find_tokenizer(self, source: Path) -> Tokenizer:
        return find_tokenizer(self._asked, source, load_weights(source)[0].real_vocab_size)

    def _load(self, name: str, source: Path) -> Opened:
        config, weights = load_weights(source)
        tokenizer, folder = self._tokenizer_of(source), model_folder(source)
        settings = GenerationSettings.load(folder) if folder.is_dir() else GenerationSettings.of(tokenizer)
        chat = ChatReader.of(tokenizer, config, settings, None, "", name) if _has_template(tokenizer) else None
        sketches = SketchFormat.of(tokenizer)
        model = build_model(config, weights, source)
        device = move(model, self._device, self._precision)
        return Opened(name, source, model, device, tokenizer, config, settings, chat, sketches)


def _has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template that can be read; another program's may not be."""
    with contextlib.suppress(InputError):
        return ChatTemplate.of(tokenizer) is not None
    return False


def _labels(named: Sequence[str]) -> dict[str, str]:
    """Return how each name is shown: a path by its last part, unless two would look alike."""
    places: dict[str, str] = {}  # a folder may be named twice
    for name in named:
        places.setdefault(os.path.abspath(name) if os.path.exists(name) else name, name)
    short = {name: os.path.basename(place) if os.path.exists(place) else name for place, name in places.items()}
    return {name: label if [*short.values()].count(label) == 1 else name for name, label in short.items()}
