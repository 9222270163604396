"""Drawings as small pictures of 0 and 1, and these as token ids that a GPT-2 draws and recognises."""
