"""Turns documents into token shards."""
