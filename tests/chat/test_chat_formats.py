"""Records of every format as conversations, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2xla.chat.formats import ChatFormat, conversation_of
from gpt2xla.errors import InputError

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TURN = [("user", "Q", True), ("assistant", "A", True)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [QUESTION, ANSWER], "id": 7}, TURN),
        ({"messages": [QUESTION, ANSWER], "prompt": "Q"}, TURN),
        ({"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER] * 2},
         [("system", "S", True), *TURN] * 2),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}]}, ANSWER]},
         [("user", "Q!", True), TURN[1]]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, TURN),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q", "weight": None},
                            {"from": "tool", "value": "T"}, {"from": "bing", "value": "A"}]},
         [("system", "S", True), TURN[0], ("tool", "T", True), TURN[1]]),
        ({"conversations": [QUESTION | {"from": None}, ANSWER]}, TURN),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]},
         [TURN[0], ("assistant", "A", False), *TURN]),
        ({"conversations": [QUESTION, ANSWER], "system": "S"}, [("system", "S", True), *TURN]),
        ({"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER], "system": "T"},
         [("system", "S", True), *TURN]),
        ({"instruction": "Q", "output": "A", "system_prompt": "S"}, [("system", "S", True), *TURN]),
        ({"instruction": "Q", "output": "A", "system": " "}, TURN),
        ({"instruction": "Q", "input": "", "output": "A", "history": [], "context": ""}, TURN),
        ({"instruction": "Q", "output": "A", "response": None}, TURN),
        ({"instruction": "Q", "input": "I", "output": "A"}, [("user", "Q\n\n### Input:\nI", True), TURN[1]]),
        ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, TURN),
        ({"instruction": "Q", "context": "C", "response": "A"}, [("user", "Q\n\nC", True), TURN[1]]),
        ({"prompt": "Q", "completion": "A"}, TURN),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, TURN),
        ({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]},
         [("user", "Q", False), ("assistant", "A", False), ("user", "Q", False), TURN[1]]),
    ],
)  # fmt: skip
def test_keys_tell_the_format(record: dict[str, Any], expected: list[tuple[str, str, bool]]) -> None:
    found = conversation_of(record)
    assert [message[:2] for message in found] == [message[:2] for message in expected]
    assert [m.trained for m in found if m.role == "assistant"] == [t for role, _, t in expected if role == "assistant"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Q", "answer": "A"}, "keys (question, answer) are those of no known format"),
        ({}, "keys (none)"),
        (
            {"instruction": "Q", "output": "A", "response": "B"},
            "of alpaca and dolly; choose with --format alpaca or dolly",
        ),
        ({"messages": [QUESTION, ANSWER], "prompt": "Q", "completion": "A"}, "messages and prompt-completion"),
        (["Q", "A"], "it is a list, not a record"),
        ("Q", "it is text, not a record"),
        ({"messages": "Q"}, "messages is text, not a list"),
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": [QUESTION]}, "no message is the assistant's"),
        ({"prompt": [QUESTION, ANSWER], "completion": [QUESTION]}, "no message is the assistant's"),
        ({"messages": [QUESTION, "A"]}, "messages, message 2, is text, not role and content"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages, message 1, has role, not role and content"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "message 2, has role, not role and content"),
        (
            {"messages": [QUESTION, {"role": "narrator", "content": "A"}]},
            "role 'narrator' is unknown; known are system, user",
        ),
        ({"messages": [QUESTION, {"role": 3, "content": "A"}]}, "role 3 is unknown"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 3}]}, "content is a number, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "content is a list, not text"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]}, "message 2 calls tools"),
        ({"messages": [QUESTION, ANSWER | {"function_call": {"name": "f"}}]}, "message 2 calls tools"),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}]}, "no message is the assistant's and trained on"),
        ({"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, "message 2: weight 0.5; choose 1, to train on it, or 0"),
        ({"messages": [QUESTION, ANSWER], "system": 3}, "system is a number, not text"),
        (
            {"instruction": "Q", "output": "A", "history": [["Q", "A"]]},
            "its history would be lost: alpaca has instruction",
        ),
        ({"instruction": "Q", "output": "A", "context": "C"}, "its context would be lost: alpaca has instruction"),
        ({"instruction": "Q", "response": "A", "input": "I"}, "its input would be lost: dolly has instruction"),
        ({"instruction": "Q", "output": 3}, "output is a number, not text"),
        ({"instruction": "Q", "output": "A\ud800"}, "output holds half a character"),
        ({"prompt": "Q", "completion": [ANSWER]}, "must both be text or both be lists"),
    ],
)
def test_what_is_no_conversation_is_refused(record: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        conversation_of(record)
    assert message in str(error.value)


@pytest.mark.parametrize(("format", "answer"), [("alpaca", "A"), ("dolly", "B")])
def test_a_doubtful_record_has_the_format_that_is_named(format: ChatFormat, answer: str) -> None:
    record = {"instruction": "Q", "output": "A", "response": "B"}
    assert conversation_of(record, format)[1].content == answer


def test_a_record_without_the_keys_of_the_named_format_is_refused() -> None:
    with pytest.raises(InputError, match="--format dolly needs response, but it has instruction, output; choose"):
        conversation_of({"instruction": "Q", "output": "A"}, "dolly")
