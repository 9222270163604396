"""Measures of a model: validation loss, HellaSwag, MMLU, tables of models and sample texts."""
