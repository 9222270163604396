"""Run by test_chat_elsewhere.py in its own process: TRL trains a chat model for one step.

Prints a JSON object with the ids and labels of its batch, its loss, and whether the step changed the weights.
"""

import json
import sys

import torch
from datasets import Dataset
from generation.chat_model import ANSWERS, SEQ_LENGTH
from trl import SFTConfig, SFTTrainer


def main(model: str, output: str) -> None:
    conversations = [
        [{"role": "user", "content": colour}, {"role": "assistant", "content": answer}]
        for colour, answer in ANSWERS.items()
    ]
    config = SFTConfig(
        output_dir=output, max_steps=1, per_device_train_batch_size=len(ANSWERS), assistant_only_loss=True, use_cpu=True,
        max_length=SEQ_LENGTH, report_to="none", save_strategy="no", bf16=False, learning_rate=1e-3,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_dict({"messages": conversations}))
    (batch,) = trainer.get_train_dataloader()
    rows = [
        [ids[mask == 1].tolist(), labels[mask == 1].tolist()]
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    loss = trainer.train().training_loss
    after = trainer.model.state_dict()
    changed = any(not torch.equal(after[name], before[name]) for name in before)
    print(json.dumps({"rows": rows, "loss": loss, "changed": changed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
