"""Files from a stranger: none of their contents is run, and what is wrong is one line that names the file."""
