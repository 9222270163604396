"""Where training runs: `base` says what the trainer needs, `torch` and `xla` provide it."""
