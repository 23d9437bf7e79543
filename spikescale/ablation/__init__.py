"""Variants of a model at equal budget: the same settings, data order and seeds, one switch changed."""
