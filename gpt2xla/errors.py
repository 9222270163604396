"""Errors whose message is for the user: one line, no traceback."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the flag or file and the mend. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of the program; the message says why and what to do. Exit code 1."""
