"""GPT-2, from token ids to the loss."""
