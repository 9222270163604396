"""The one exception that means: the input is wrong, not the program."""


class InputError(ValueError):
    """What the user gave cannot work; the message is one line that names the flag or file and the mend.

    Command lines print the message and exit with code 2; every other exception is a failure of the run (code 1).
    """
