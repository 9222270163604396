"""Where a run's numbers and progress go."""
