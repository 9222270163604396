"""What the page does on a click. Work on models is done for one visitor after another, in one thread, and its results are
shown as they come; those who wait see their place in the queue.

Mistakes of a visitor become a note on the page. None of the events is part of a public API."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import gradio as gr

from gpt2xla.errors import InputError, RunFailed, is_out_of_memory
from gpt2xla.playground.models import Models

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_TURNS: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
# Functions of the browser that turn a button off and on.
_OFF, _ON = (f"() => ({{__type__: 'update', interactive: {is_on}}})" for is_on in ("false", "true"))
_PAUSE = 0.1  # seconds between two results that are shown: a browser draws slower than a model writes


def on_turn(
    models: Models,
    triggers: Sequence[Any],
    work: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    start: gr.Button | None = None,
    stop: gr.Button | None = None,
    **options: Any,
) -> Any:
    """Do `work` with models when one of `triggers`, such as `button.click`, happens, and return Gradio's event.

    Args:
        work: gets the values of `inputs` and returns those of `outputs`, or yields them again and again. If it yields
            faster than the page can show, only the newest are shown. An InputError or RunFailed ends it with a note.
        start: this button is off until the work has ended, also after a click on `stop`: Gradio would drop its clicks.
        stop: this button ends the work where it yields, also while it waits for its turn."""
    if start is not None:  # before the event itself: what follows it in Gradio's list waits for its end
        gr.on(list(triggers), None, None, start, js=_OFF, queue=False, **QUIET)
    event = gr.on(
        list(triggers),
        _in_thread(models, work),
        list(inputs),
        list(outputs),
        **(_TURNS | {"show_progress": "full"} | options),
    )
    if start is not None:
        for ended in (event.then, event.failure):  # by Gradio's errors, such as a full queue, only the second
            ended(None, None, start, js=_ON, queue=False, **QUIET)
    if stop is not None:
        stop.click(None, cancels=[event], queue=False, **QUIET)
    return event


class _End(NamedTuple):
    """Stands after the last result of some work."""

    error: Exception | None = None


def _in_thread(models: Models, work: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """Return a function for Gradio, which may call and close it in any thread, that does `work` in the models' thread."""

    @functools.wraps(work)
    def shown(*inputs: Any) -> Iterator[Any]:
        results: SimpleQueue[Any] = SimpleQueue()
        is_stopped = threading.Event()

        def do() -> None:
            end = _End()
            try:
                steps = work(*inputs) if inspect.isgeneratorfunction(work) else (work(*inputs) for _ in range(1))
                with contextlib.closing(steps):
                    while not is_stopped.is_set() and (result := next(steps, end)) is not end:
                        results.put(result)
            except Exception as error:
                end = _End(error)
            results.put(end)

        models.thread.do(do)
        try:
            end = yield from _newest(results)
        finally:
            is_stopped.set()
        if end.error is not None:
            tell(end.error)

    return shown


def _newest(results: SimpleQueue[Any]) -> Generator[Any, None, _End]:
    """Yield results as they come, the newest alone where several are there, up to the end, which is returned."""
    result = results.get()
    while not isinstance(result, _End):
        following = None if results.empty() else results.get()
        if following is None or isinstance(following, _End):
            yield result
            time.sleep(0 if following else _PAUSE)
        result = results.get() if following is None else following
    return result


def tell(error: Exception) -> None:
    """Show visitors a note about an error, in a queued event. One that is not theirs is printed in the terminal."""
    if is_out_of_memory(error):
        text = "memory has run out; end other programs, or choose a smaller model or a shorter text"
    elif isinstance(error, InputError | RunFailed):
        text = str(error)
    else:
        traceback.print_exception(error)
        text = "this failed for a reason that the page does not know; the terminal shows it"
    gr.Warning(html.escape(text))
