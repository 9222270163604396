"""Files of token ids: ours and other trainers'."""
