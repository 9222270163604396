"""The programs: options, then the function that does the work. `scripts/`, the files at the top of the repository and
`gpt2xla` (dispatch.py) call them.
"""
