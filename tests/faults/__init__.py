"""Faults done to real processes, whose results are compared with an undisturbed run."""
