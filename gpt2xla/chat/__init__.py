"""Conversations and the templates that write them as token ids."""
