"""The training story: opens a run, loops over steps, updates the weights."""
