"""The ways of instruct tuning that `packing.py` compares, each in a process of its own: it waits for a line with a number of
updates on its standard input, makes them, and answers with the tokens that counted in each and the seconds it took.

All begin with the same weights and read the same conversations, about as many per update: what differs is their shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from gpt2xla.chat.conversations import Conversation
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import RunConfig, TorchConfig, XlaConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.preparation.rows import Sample, pack
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.data.windows import Batch
from gpt2xla.model.loss import IGNORED_LABEL

CONVERSATIONS = 32  # per update
RATE = 2e-5  # SFTTrainer's learning rate
UPDATES = 10_000  # more than anyone asks for


@dataclasses.dataclass(frozen=True)
class Job:
    """What is tuned on what: `model` is a folder of weights and tokenizer, `records` a JSON file of alpaca records."""

    model: Path
    records: Path
    seq_length: int

    def conversations(self) -> list[Conversation]:
        """Return all conversations in one shuffled order."""
        from gpt2xla.chat.formats import conversation_of

        found = [conversation_of(record) for record in json.loads(self.records.read_text(encoding="utf-8"))]
        return [found[number] for number in np.random.default_rng(0).permutation(len(found))]

    def samples(self) -> tuple[list[Sample], int]:
        """Return the conversations as ids with their masks, and the end-of-text id."""
        tokenizer, template = load_tokenizer(str(self.model)), ChatTemplate.named("chatml")
        assert tokenizer.eot_id is not None
        return [Sample(*template.encode(tokenizer, one), 0) for one in self.conversations()], tokenizer.eot_id


class Rows(NamedTuple):
    """Ids and labels, both (rows, T), and how many rows a micro-step takes, how many micro-steps an update."""

    ids: np.ndarray
    labels: np.ndarray
    micro_batch: int
    accum: int

    def updates(self, cut: bool) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one update after another, epoch after epoch. `cut`: to their longest conversation."""
        for numbers in _in_turn(len(self.ids), self.micro_batch * self.accum):
            ids, labels = (part[numbers].astype(np.int64) for part in (self.ids, self.labels))
            length = int(np.flatnonzero((labels != IGNORED_LABEL).any(0))[-1]) + 1 if cut else ids.shape[1]
            yield [
                Batch(
                    torch.from_numpy(ids[start:end, :length].copy()),
                    torch.from_numpy(labels[start:end, :length].copy()),
                )
                for start, end in itertools.pairwise(range(0, len(numbers) + 1, self.micro_batch))
            ]


def _in_turn(rows: int, count: int) -> Iterator[list[int]]:
    numbers = itertools.cycle(range(rows))
    while True:
        yield list(itertools.islice(numbers, count))


def packed(job: Job) -> Rows:
    """Whole conversations in rows of T tokens, as prepare_chat.py writes them."""
    samples, eot_id = job.samples()
    rows = list(pack(samples, job.seq_length, eot_id))
    ids, trained = np.stack([row.ids for row in rows]), np.stack([row.trained for row in rows])
    per_update = max(1, round(CONVERSATIONS * len(rows) / len(samples)))
    return Rows(ids, _labels(ids, trained), per_update, 1)


def padded(job: Job, micro_batch: int | None = None) -> Rows:
    """One conversation per row of T tokens, which is what static shapes are without packing. Micro-steps have by default as
    many rows as a packed update, or the next power of two."""
    samples, eot_id = job.samples()
    ids = np.full((len(samples), job.seq_length), eot_id, dtype=np.uint32)
    trained = np.zeros(ids.shape, dtype=np.bool_)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)], trained[row, : len(sample.ids)] = sample.ids, sample.trained
    micro_batch = micro_batch or 1 << (packed(job).micro_batch - 1).bit_length()
    return Rows(ids, _labels(ids, trained), micro_batch, CONVERSATIONS // micro_batch)


def _labels(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    labels = np.where(trained, ids.astype(np.int64), IGNORED_LABEL)
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)


def ours(job: Job, wanted: Iterator[list[int]], rows: Rows, *, xla: bool = False, cut: bool = False) -> None:
    """The trainer's own step."""
    from gpt2xla.checkpoint.loading import build_model
    from gpt2xla.training.train_step import TrainStep

    shape, weights = hf.load_model(job.model)
    options = {
        "train_batch_size": rows.micro_batch, "gradient_accum_step": rows.accum, "mixed_precision": "none",
        "learning_rate": RATE, "min_lr": 0.0, "warmup_steps": 0, "weight_decay": 0.0, "betas": (0.9, 0.999),
        "document_mask": True, "train_steps": UPDATES, "decay_method": "linear", "compile": False,
    }  # fmt: skip
    config = dataclasses.replace(RunConfig.from_flat(options), model=shape)
    runtime = _xla(config) if xla else _torch(config)
    model = build_model(config.model, weights, job.model)
    model.end_of_text = load_tokenizer(str(job.model)).eot_id
    step = TrainStep(config, runtime, model, None)
    # What an update counts is known before its batches are: these are fetched ahead.
    counts = (sum(int((b.labels != IGNORED_LABEL).sum()) for b in update) for update in rows.updates(cut))
    batches = runtime.device_batches(itertools.chain.from_iterable(rows.updates(cut)))

    def update(number: int, trained: int) -> Tensor:
        loss, grad_norm, _ = step(batches, number, Phase(0, rows.micro_batch, rows.accum), trained)
        return torch.stack([loss, grad_norm])

    executed = runtime.compile_step(update, "training step")
    model.train()
    for number, (out, trained) in enumerate(zip(wanted, counts, strict=False)):
        out.append(trained)
        executed(number, trained).tolist()
    print("programs:", runtime.watch.programs(), file=sys.stderr)


def _torch(config: RunConfig) -> Any:
    from gpt2xla.runtime.torch.runtime import TorchRuntime

    return TorchRuntime(TorchConfig(), config.train)


def _xla(config: RunConfig) -> Any:
    from gpt2xla.runtime.xla.runtime import XlaRuntime

    return XlaRuntime(XlaConfig(use_syncfree_optim=True), config.train)


def trl(job: Job, wanted: Iterator[list[int]], **options: Any) -> None:
    """SFTTrainer in fp32 on the same messages, with our template, so that the same tokens count."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2LMHeadModel, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    counted: list[list[int]] = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn = next(wanted, None)
            if turn is None:
                raise SystemExit
            counted.append(turn)

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            counted[-1].append(int((inputs["labels"] != IGNORED_LABEL).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.chat_template = ChatTemplate.named("chatml").source
    tokenizer.pad_token = tokenizer.eos_token
    model = GPT2LMHeadModel.from_pretrained(job.model)
    batch = packed(job).micro_batch if options.get("packing") else CONVERSATIONS
    arguments = SFTConfig(
        output_dir=str(job.model / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_steps=UPDATES, max_length=job.seq_length, assistant_only_loss=True, bf16=False, use_cpu=True,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = Dataset.from_list(
        [
            {"messages": [{"role": message.role, "content": message.content} for message in one]}
            for one in job.conversations()
        ]
    )
    trainer = Counting(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Turns()])
    theirs = sum(np.count_nonzero(np.array(labels) != IGNORED_LABEL) for labels in trainer.train_dataset["labels"])
    assert theirs == np.count_nonzero(padded(job).labels != IGNORED_LABEL), theirs  # the same tokens count
    trainer.train()


CONTENDERS: dict[str, Callable[[Job, Iterator[list[int]]], None]] = {
    "packed, torch": lambda job, wanted: ours(job, wanted, packed(job)),
    "padded to the row, torch": lambda job, wanted: ours(job, wanted, padded(job)),
    "padded to the longest, torch": lambda job, wanted: ours(job, wanted, padded(job, CONVERSATIONS), cut=True),
    "packed, XLA": lambda job, wanted: ours(job, wanted, packed(job), xla=True),
    # Several micro-steps are one long program, which a CPU compiles for minutes.
    "padded to the row, XLA": lambda job, wanted: ours(job, wanted, padded(job, CONVERSATIONS), xla=True),
    "SFTTrainer": trl,
    "SFTTrainer, no checkpointing": lambda job, wanted: trl(job, wanted, gradient_checkpointing=False),
    "SFTTrainer, packing": lambda job, wanted: trl(job, wanted, packing=True),
    "SFTTrainer, packing, no checkpointing": lambda job, wanted: trl(
        job, wanted, packing=True, gradient_checkpointing=False
    ),
}


def turns(answers: TextIO) -> Iterator[list[int]]:
    """One item per update that is asked for: a list that takes its counts of trained tokens."""
    for line in sys.stdin:
        trained: list[int] = []
        clocks = [(time.perf_counter(), time.process_time())]
        for _ in range(int(line)):
            counts: list[int] = []
            yield counts
            trained.append(sum(counts))
            clocks.append((time.perf_counter(), time.process_time()))
        wall, cpu = (
            [after - before for before, after in itertools.pairwise(times)] for times in zip(*clocks, strict=True)
        )
        print(json.dumps({"trained": trained, "seconds": wall, "cpu_seconds": cpu}), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    for name in ("model", "records"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what the trainers print is no answer
    CONTENDERS[args.contender](Job(args.model, args.records, args.seq_length), turns(answers))


if __name__ == "__main__":
    main()
