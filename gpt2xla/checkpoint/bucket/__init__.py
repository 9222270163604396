"""A run and its models in an object store: brought to this machine at the start, sent back after each save."""
