"""Measures of a model: validation loss, HellaSwag, perplexity tables and sample texts."""
