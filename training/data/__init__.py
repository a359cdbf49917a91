"""Datasets and caches for training."""
