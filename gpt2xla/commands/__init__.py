"""The programs: their options and their `main`. `scripts/`, the files at the top of the repository and `gpt2xla`
(dispatch.py) call them.
"""
