import threading
from collections import Counter

import pytest

from gpt2xla.logs.console import say


def test_lines_of_several_threads_stay_whole(capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["the training step is compiled", "step 1: loss 4.5", "wandb failed"]
    threads = [threading.Thread(target=lambda text: [say(text) for _ in range(2000)], args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(capfd.readouterr().out.splitlines()) == dict.fromkeys(texts, 2000)
