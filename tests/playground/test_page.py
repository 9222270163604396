"""The page in a browser: loading it, writing, chatting, several visitors, and what it must not give away."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from playground.conftest import Visit, choose, notes, set_number

if TYPE_CHECKING:
    from playwright.sync_api import Page

VISITORS = 8
ODD_TEXT = "<b>{{7*7}} ${1+1} </span>"


def write(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Write", exact=True).click()


def set_new_tokens(page: Page, count: int) -> None:
    page.get_by_role("button", name="Settings").click()
    set_number(page, "New tokens", count)


def test_the_page_loads_little(visit: Visit) -> None:
    """Seconds depend on the machine and on what else it does; what is loaded does not."""
    page = visit()
    page.get_by_role("button", name="Write", exact=True).wait_for()
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint').length") == 1
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.decodedBodySize)")
    assert len(loaded) < 80
    assert sum(loaded) < 2_500_000
    shown = [tab.inner_text() for tab in page.get_by_role("tab").all()]
    assert shown == ["Write", "Chat", "Draw", "Recognise", "Look inside", "Runs"]


def test_a_text_streams_until_it_is_stopped(visit: Visit) -> None:
    """And the next click is served, however soon it comes: after Stop, and after a reload that leaves a text."""
    page = visit()
    set_new_tokens(page, 1000)
    write(page, ODD_TEXT)
    tokens = page.locator(".token")
    tokens.nth(5).wait_for(state="attached")  # a token may be a character that takes no room
    assert page.get_by_role("button", name="Write", exact=True).is_disabled()
    page.get_by_role("button", name="Stop", exact=True).click()
    write(page, "Another")
    page.locator(".prompt", has_text="Another").wait_for()
    tokens.nth(5).wait_for(state="attached")
    page.reload()
    set_new_tokens(page, 8)
    write(page, ODD_TEXT)
    note = page.locator(".written + .note")
    note.wait_for()
    assert re.fullmatch(r"8 tokens, cut, seed \d+", note.inner_text())
    assert page.locator(".written .prompt").inner_text() == ODD_TEXT
    lines = tokens.first.get_attribute("data-tip").split("\n\n")[0].splitlines()
    assert len(lines) in (5, 6)
    assert sum(line.startswith("▸") for line in lines) == 1
    page.get_by_role("button", name="Write", exact=True).click(trial=True)  # once it is on again


def test_settings_and_models_that_do_not_fit_are_notes(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("7")
    set_stop = page.get_by_label("Stop before")
    set_stop.fill("\n".join("abcdefghijklmnopqrstuvwxyz"))
    write(page, "x")
    assert "at most 20" in notes(page)
    page.get_by_role("tab", name="Chat").click()
    page.get_by_placeholder("Message").fill("red")
    page.get_by_placeholder("Message").press("Enter")
    page.get_by_text("run@latest was not trained to chat").wait_for()


def test_a_conversation(visit: Visit) -> None:
    page = visit()
    choose(page, "chat")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Temperature", 0)
    box, answers = page.get_by_placeholder("Message"), page.locator(".bot .message-content, .bot.message")
    for question, answer in (("red", "an apple"), ("blue", "the sky")):
        box.fill(question)
        box.press("Enter")
        answers.get_by_text(answer, exact=True).wait_for()
        assert box.input_value() == ""
    page.get_by_role("button", name="Start again").click()
    page.get_by_text("Say something to the model.").wait_for()


@pytest.mark.slow  # eight browsers
def test_eight_visitors_at_once(visit: Visit) -> None:
    pages = [visit() for _ in range(VISITORS)]
    for number, page in enumerate(pages):
        write(page, f"I am visitor {number}")
    for number, page in enumerate(pages):
        note = page.locator(".written + .note")
        note.wait_for()
        assert note.inner_text().startswith("100 tokens, cut")
        assert page.locator(".written .prompt").inner_text() == f"I am visitor {number}"
        assert page.locator(".toast-body").count() == 0


def test_eight_visitors_are_served_in_turn(address: str) -> None:
    """What their browsers would ask for."""
    config = json.loads(request(address, "/config")[1])
    [written] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "written"]
    [number] = [event["id"] for event in config["dependencies"] if event["outputs"] == [written]]
    for visitor in range(VISITORS):
        data = ["run@latest", f"I am visitor {visitor}", 1, 100, 0, 1, 1, "", ""]
        body = {"fn_index": number, "data": data, "session_hash": f"visitor{visitor}"}
        assert request(address, "/gradio_api/queue/join", body)[0] == 200
    for visitor in range(VISITORS):
        status, told = request(address, f"/gradio_api/queue/data?session_hash=visitor{visitor}")
        *_, end = [
            event for event in map(json.loads, re.findall("data: (.+)", told)) if event["msg"] == "process_completed"
        ]
        assert (status, end["success"]) == (200, True)
        assert f"I am visitor {visitor}</span>" in told
        assert "100 tokens, cut" in told


def request(address: str, path: str, body: object = None) -> tuple[int, str]:
    """Status and body of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET" if body is None else "POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_other_sites_and_endless_requests_are_refused(address: str) -> None:
    """A site may give its name this machine's address, and may send files and texts to any address without asking."""
    port = urlsplit(address).port
    for host, expected in {
        f"localhost:{port}": 200, f"127.0.0.1:{port}": 200, f"[::1]:{port}": 200, f"site.example:{port}": 403,
        f"127.0.0.1.site.example:{port}": 403, "[": 403, "": 403,
    }.items():  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/config", headers={"Host": host})
        assert connection.getresponse().status == expected, host
    for path, headers, expected in (
        ("/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=a", "Content-Length": "0"}, 403),
        ("/gradio_api/queue/join", {"Content-Type": "text/plain", "Content-Length": str(2**30)}, 413),
        ("/gradio_api/queue/join", {"Transfer-Encoding": "chunked"}, 411),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == expected, path


@pytest.mark.parametrize(
    "before", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"]
)
def test_files_are_not_given_away(before: str, address: str, models: list[Path]) -> None:
    config = next(models[0].glob("step-*")) / "config.json"
    for path in ("/etc/passwd", "../../../../../../../../etc/passwd", str(config), "gpt2xla/playground/page.py"):
        status, body = request(address, before + path)
        assert status in (403, 404), (before + path, status, body[:80])


def test_only_the_named_models_are_opened(address: str, models: list[Path]) -> None:
    """Whatever a visitor sends in place of the name."""
    status, config = request(address, "/config")
    assert status == 200
    assert str(models[0]) not in config  # where the models are is nobody's business
    works = [event["id"] for event in json.loads(config)["dependencies"] if event["queue"] is not False]
    for name in ("/etc", str(models[1]), "../chat", "gpt2"):
        for number in works:
            body = {"fn_index": number, "data": [name, "x", *[1] * 20], "session_hash": "mine"}
            status, _ = request(address, "/gradio_api/run/predict", body)
            assert status >= 400
