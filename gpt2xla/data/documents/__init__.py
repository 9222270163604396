"""Documents read from a user's files."""
