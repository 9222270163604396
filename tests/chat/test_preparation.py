"""`prepare_chat.py`: what the rows hold, against the conversations given; its reports; and what it refuses."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, run, run_here, succeed
from data.hub_server import Hub
from data.test_hub import environment

from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.files import file_sha256

INSTRUCT = ROOT.parent / "shared" / "data" / "instruct" / "instruction-data.json"
BYTES = ["--tokenizer", "bytes", "--add-special-tokens", "--seq-length", "200"]


def chat(number: int, turns: int = 1) -> list[dict[str, str]]:
    return [
        message
        for turn in range(turns)
        for message in (
            {"role": "user", "content": f"Question {number}.{turn} <|im_end|> 🙂"},
            {"role": "assistant", "content": f"Answer {number}.{turn}" + "!" * (number % 9)},
        )
    ]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def prepare(*flags: object, folder: Path) -> list[str]:
    """Return the lines that it prints."""
    return succeed(run_here("scripts/prepare_chat.py", *BYTES, "--output-dir", folder, *flags)).splitlines()


def refusal(*flags: object) -> str:
    result = run_here("scripts/prepare_chat.py", *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def conversations(folder: Path) -> list[tuple[str, list[str]]]:
    """What a split's rows hold: each conversation as text, and the parts of it that are trained on."""
    stream, tokenizer = TokenStream(folder), load_tokenizer(str(folder))
    assert stream.manifest is not None
    length, eot = stream.manifest.row_length, tokenizer.eot_id
    assert length is not None
    assert stream.length % length == 1
    ids, trained = stream.read(0, stream.length), stream.trained(0, stream.length)
    assert trained.sum() == stream.manifest.trained_tokens
    found = []
    for row, mask in zip(ids[:-1].reshape(-1, length), trained[:-1].reshape(-1, length), strict=True):
        starts = [*np.flatnonzero(row == eot), length]
        for start, end in itertools.pairwise(starts):
            if end - start > 1:  # or else it fills the row
                part, on = row[start:end], mask[start:end]
                pieces = np.split(np.arange(len(part)), np.flatnonzero(np.diff(on)) + 1)
                texts = [tokenizer.decode(part[piece].tolist()) for piece in pieces if on[piece[0]]]
                found.append((tokenizer.decode(part.tolist()), texts))
    return found


def as_chatml(messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"<|endoftext|>{text}", [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]


def frozen(found: list[tuple[str, list[str]]]) -> Counter:
    return Counter((text, tuple(texts)) for text, texts in found)


def test_every_conversation_stands_in_one_split_with_its_answers_trained(tmp_path: Path) -> None:
    chats = [chat(number, turns=1 + number % 3) for number in range(60)]
    given = tmp_path / "given"
    given.mkdir()
    (given / "a.jsonl").write_text(lines(*({"messages": messages} for messages in chats[:20])))
    other = [[{"from": m["role"], "value": m["content"]} for m in messages] for messages in chats[20:35]]
    (given / "b.json").write_text(json.dumps([{"conversations": messages} for messages in other], indent=1))
    pa.parquet.write_table(pa.table({"messages": chats[35:45], "source": ["x"] * 10}), given / "c.parquet")
    single = [messages for messages in chats[45:] if len(messages) == 2]
    alone = tmp_path / "d.jsonl"
    alone.write_text(lines(*({"prompt": [m[0]], "completion": [m[1]]} for m in single)))
    said = prepare("--seq-length", 256, "--input", given, alone, folder=tmp_path / "out")
    expected = [as_chatml(messages) for messages in [*chats[:45], *single]]
    train, test = conversations(tmp_path / "out" / "train"), conversations(tmp_path / "out" / "test")
    assert frozen(train + test) == frozen(expected)
    assert len(test) == round(0.1 * len(expected))
    assert said[0].startswith("added to tokenizer bytes: <|im_start|> = 257, <|im_end|> = 258; ")
    assert said[1].startswith(f"{given}: 45 conversations read, 45 kept, the longest ")
    assert said[2].startswith(f"{alone}: {len(single)} conversations read, {len(single)} kept, the longest ")
    tokens = TokenStream(tmp_path / "out" / "test").manifest
    assert tokens is not None
    assert said[4].startswith(f"{tmp_path / 'out' / 'test'}: {tokens.tokens // 256} row")
    assert said[4].endswith(f"{tokens.trained_tokens:,} tokens trained on")


def test_the_same_input_gives_the_same_bytes_and_a_prepared_folder_stays(tmp_path: Path) -> None:
    given = tmp_path / "a.jsonl"
    given.write_text(lines(*({"messages": chat(number)} for number in range(40))))
    hashes = []
    for name in ("one", "two"):
        prepare("--input", given, folder=tmp_path / name)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        hashes.append([(str(file.relative_to(tmp_path / name)), file_sha256(file)) for file in files])
    assert hashes[0] == hashes[1]
    assert not list(tmp_path.glob("*/.partial"))
    flags = ["--input", given]
    assert prepare(*flags, folder=tmp_path / "one")[-1].endswith("is prepared already: nothing to do")
    output = [*BYTES, "--output-dir", tmp_path / "one"]
    common = [*output, *flags]
    assert "was prepared with --seed 1061109567, now 5" in refusal(*common, "--seed", 5)
    assert "was prepared with --chat-template chatml, now alpaca" in refusal(*common, "--chat-template", "alpaca")
    assert "a share of 1, but now there is" in refusal(*output, "--input", f"{given}=0.5")
    unchanged = given.read_text()
    given.write_text(unchanged.replace("a", "b"))
    assert "sha256" in refusal(*common), "edited, with the same size"
    given.write_text(unchanged)
    orders = []
    for seed in (1, 2):
        prepare(*flags, "--seed", seed, folder=tmp_path / str(seed))
        orders.append([conversations(tmp_path / str(seed) / split) for split in ("train", "test")])
    assert orders[0] != orders[1]
    assert frozen(orders[0][0] + orders[0][1]) == frozen(orders[1][0] + orders[1][1])


def test_a_share_of_a_source_is_drawn(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        records = ({"messages": chat(number)} for number in range(first, first + 50))
        (tmp_path / f"{name}.jsonl").write_text(lines(*records))
    said = prepare("--input", tmp_path / "a.jsonl", f"{tmp_path / 'b.jsonl'}=0.3", folder=tmp_path / "out")
    found = conversations(tmp_path / "out" / "train") + conversations(tmp_path / "out" / "test")
    whole = frozen([as_chatml(chat(number)) for number in range(50)])
    assert whole <= frozen(found)
    assert len(found) == 50 + 15
    assert frozen(found) - whole <= frozen([as_chatml(chat(number)) for number in range(100, 150)])
    assert "50 conversations read, 15 kept" in said[2]
    assert said[2].endswith("; left out: 35 beyond its share of 0.3")


def test_what_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    given = tmp_path / "a.jsonl"
    blank = {"role": "assistant", "content": " \n"}
    records = [
        chat(1),
        [*chat(2)[:1], blank],
        [*chat(3)[:1], blank, *chat(4)],
        chat(5, turns=9),
        chat(6, turns=5),
        chat(7),
    ]
    given.write_text(lines(*({"messages": messages} for messages in records)))
    said = prepare("--input", given, folder=tmp_path / "all")
    lengths = [3 + sum(len(f"s{m['role']}\n{m['content']}e\n".encode()) for m in messages) - 2 for messages in records]
    left_out = (
        f"2 with an empty answer, 2 longer than 200 tokens, the longest of {max(lengths)} tokens: {given}, line 4"
    )
    assert said[1].endswith(f"; left out: {left_out}")
    assert f"6 conversations read, 2 kept, the longest {max(lengths[0], lengths[-1])} tokens" in said[1]
    said = prepare("--input", given, "--loss-on", "last-answer", folder=tmp_path / "last")
    assert "1 with an empty answer" in said[1]
    found = conversations(tmp_path / "last" / "train") + conversations(tmp_path / "last" / "test")
    assert frozen(found) == frozen(
        [(as_chatml(r)[0], as_chatml(r)[1][-1:]) for r in (records[0], records[2], records[5])]
    )
    flags = [*BYTES, "--output-dir", tmp_path / "none", "--input", given]
    message = refusal(*flags, "--too-long", "raise")
    assert f"{given}, line 4: {lengths[3]} tokens do not fit into --seq-length 200; " in message
    assert not (tmp_path / "none").exists()


def test_a_system_message_is_for_conversations_without_one(tmp_path: Path) -> None:
    given, own = tmp_path / "a.jsonl", {"role": "system", "content": "Mine."}
    given.write_text(lines({"messages": chat(1)}, {"messages": [own, *chat(2)]}))
    prepare("--input", given, "--system", "Yours.", folder=tmp_path / "out")
    found = conversations(tmp_path / "out" / "train") + conversations(tmp_path / "out" / "test")
    yours = {"role": "system", "content": "Yours."}
    assert frozen(found) == frozen([as_chatml([yours, *chat(1)]), as_chatml([own, *chat(2)])])


def test_turns_that_end_with_the_end_of_text_are_reported(tmp_path: Path) -> None:
    given = tmp_path / "a.jsonl"
    given.write_text(lines(*({"messages": chat(number, turns=1 + number % 2)} for number in range(4))))
    flags = ["--chat-template", "alpaca", "--seq-length", "400", "--input", given]
    said = prepare(*flags, folder=tmp_path / "out")
    assert any(line.startswith("note: end-of-text ends earlier answers in 2 conversations; ") for line in said)


def test_a_killed_preparation_is_begun_again_or_finished(tmp_path: Path) -> None:
    given, out = tmp_path / "a.jsonl", tmp_path / "out"
    given.write_text(lines(*({"messages": chat(number)} for number in range(9))))
    prepare("--input", given, folder=out)
    whole = {file.relative_to(out): file_sha256(file) for file in sorted(out.rglob("*")) if file.is_file()}
    (out / ".partial").mkdir()
    for name in ("test", "preparation.json"):  # between two renames
        (out / name).rename(out / ".partial" / name)
    prepare("--input", given, folder=out)
    assert {file.relative_to(out): file_sha256(file) for file in sorted(out.rglob("*")) if file.is_file()} == whole
    (out / ".partial").mkdir()
    for name in ("train", "test"):
        (out / name).rename(out / ".partial" / name)
    (out / "preparation.json").unlink()  # before it was written
    (out / ".partial" / "train" / "shard_000000.npy").write_bytes(b"half")
    prepare("--input", given, folder=out)
    assert {file.relative_to(out): file_sha256(file) for file in sorted(out.rglob("*")) if file.is_file()} == whole


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.jsonl").write_text(lines({"messages": chat(1)}, {"messages": chat(2)}))
    monkeypatch.setattr("gpt2xla.chat.preparation.write_rows", full)
    flags = [*BYTES, "--input", tmp_path / "a.jsonl", "--output-dir", tmp_path / "out"]
    result = run_here("scripts/prepare_chat.py", *flags)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "no space left on the disk" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.jsonl", lines({"messages": chat(1)}) + "\n" + lines({"messages": chat(2)[:1]}), [],
         "a.jsonl, line 3: no message is the assistant's"),
        ("a.jsonl", lines({"messages": chat(1)}) + '{"messages": [}\n', [], "a.jsonl, line 2, is not JSON"),
        ("a.json", json.dumps([{"messages": chat(1)}, {"text": "x"}]), [], "a.json, record 2: its keys (text) are"),
        ("a.json", '[{"messages": []}, {"messages"', [], "a.json, record 1: no message is the assistant's"),
        ("a.jsonl", lines({"messages": [{"role": "narrator", "content": "x"}]}), [], "line 1: messages, message 1: role"),
        ("a.jsonl", lines({"messages": chat(1)}), [], "need a conversation each, and 1 is left"),
        ("a.jsonl", lines({"messages": chat(1)}, {"messages": chat(2)}), ["--no-add-special-tokens"],
         "tokenizer bytes lacks <|im_start|>, <|im_end|>, which the chat template writes; prepare_chat.py --add-special"),
        ("a.jsonl", lines({"messages": chat(1)}), ["--chat-template", "llama"],
         "--chat-template llama: neither chatml, alpaca nor a file"),
        ("a.jsonl", lines({"messages": [{"role": "tool", "content": "x"}, *chat(1)]}), ["--chat-template", "alpaca"],
         "a.jsonl, line 1: --chat-template alpaca: alpaca has a place for"),
        ("a.jsonl", "\n", [], "a.jsonl holds no records"),
        ("a.csv", "messages\nx\n", [], "a.csv holds csv, not records"),
        ("a.jsonl", lines({"messages": chat(1)}), ["--test-fraction", "1"], "--test-fraction 1.0: choose a share"),
        ("a.jsonl", lines({"messages": chat(1)}), ["--system", ""], "--system is empty"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    name: str, content: str, flags: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    line = refusal(*BYTES, "--output-dir", tmp_path / "out", "--input", tmp_path / name, *flags)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_wrong_names_and_weights_are_refused(tmp_path: Path) -> None:
    given = tmp_path / "a.jsonl"
    given.write_text(lines({"messages": chat(1)}, {"messages": chat(2)}))
    flags = [*BYTES, "--output-dir", tmp_path / "out", "--input"]
    assert "choose a share above 0 and at most 1" in refusal(*flags, f"{given}=2")
    assert "2 times; name it once" in refusal(*flags, given, f"{given}=0.5")
    assert "missing.jsonl: no such file" in refusal(*flags, tmp_path / "missing.jsonl")
    assert "nothing to read" in refusal(*flags[:-1])
    (tmp_path / "out" / "train").mkdir(parents=True)
    assert "train/ exists already" in refusal(*flags, given)
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_local_folder_of_splits(tmp_path: Path) -> None:
    given, numbers = tmp_path / "given", {"train": range(20), "test": range(50, 70)}
    given.mkdir()
    for split in numbers:
        (given / f"{split}.jsonl").write_text(lines(*({"messages": chat(number)} for number in numbers[split])))
    for split in numbers:
        prepare("--dataset", given, "--split", split, folder=tmp_path / split)
        found = [conversations(tmp_path / split / name) for name in ("train", "test")]
        assert frozen(found[0] + found[1]) == frozen([as_chatml(chat(number)) for number in numbers[split]])


@pytest.mark.slow
def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    records = lines(*({"messages": chat(number)} for number in range(20)))
    with Hub("me/set", {"train.jsonl": records.encode()}) as hub:
        flags = [*BYTES, "--dataset", "me/set", "--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out"]
        said = succeed(run("scripts/prepare_chat.py", *flags, **environment(hub, tmp_path)))
        hub.shutdown()
    assert "me/set: 20 conversations read, 20 kept" in said
    found = conversations(tmp_path / "out" / "train") + conversations(tmp_path / "out" / "test")
    assert frozen(found) == frozen([as_chatml(chat(number)) for number in range(20)])


def test_instruction_data(tmp_path: Path) -> None:
    """1,100 real records."""
    if not INSTRUCT.exists():
        pytest.skip(f"needs {INSTRUCT}")
    said = prepare("--seq-length", 512, "--input", INSTRUCT, folder=tmp_path / "out")
    assert "1,100 conversations read, 1,100 kept" in said[1]
    records = json.loads(INSTRUCT.read_text())
    expected = []
    for record in records:
        asked = record["instruction"] + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")
        user, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}
        expected.append(as_chatml([user, answer]))
    test = conversations(tmp_path / "out" / "test")
    assert len(test) == 110
    assert frozen(conversations(tmp_path / "out" / "train") + test) == frozen(expected)
