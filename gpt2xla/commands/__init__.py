"""The programs: their options and their `main`. `scripts/` and the files at the top of the repository call them."""
