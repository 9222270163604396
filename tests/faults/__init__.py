"""What a run survives: faults done to real processes, and what is left of them compared with an undisturbed run."""
