"""`python -m gpt2xla COMMAND ...` is `gpt2xla COMMAND ...`."""

from gpt2xla.commands.dispatch import main

if __name__ == "__main__":
    main()
