"""The programs: options, then the function that does the work. `scripts/` and the files at the top of the repository call them."""
