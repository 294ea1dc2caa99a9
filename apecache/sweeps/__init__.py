"""Hyperparameter sweeps on one store."""
