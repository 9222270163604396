"""How a process ends: exit codes, signals and locks. Nothing here imports torch."""
