"""Retrieval and zero-shot evaluation."""
