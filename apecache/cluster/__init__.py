"""Extraction and sweeps on a Ray cluster."""
