#!/usr/bin/env python
"""How soon the playground's page shows something, and can be used, in headless Chromium.

    gpt2xla playground --model checkpoints
    python benchmarks/first_paint.py http://127.0.0.1:7860/

Each visit is one of a new visitor, whose browser has nothing in its cache. Needs Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--visits", type=int, default=11)
    args = parser.parse_args()
    painted, usable, requests = [], [], []
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(args.visits):
            visitor = browser.new_context()
            page, asked = visitor.new_page(), []
            page.on("request", lambda request, asked=asked: asked.append(request))
            start = time.perf_counter()
            page.goto(args.address)
            page.get_by_role("button", name="Write", exact=True).wait_for()
            usable.append(1000 * (time.perf_counter() - start))
            painted.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            requests.append(len(asked))
            visitor.close()
        browser.close()
    for name, times in (("first contentful paint", painted), ("the button is there", usable)):
        print(f"{name}: median {statistics.median(times):.0f} ms, {min(times):.0f} to {max(times):.0f}")
    print(f"requests: {statistics.median(requests):.0f}")


if __name__ == "__main__":
    main()
