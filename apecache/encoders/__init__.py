"""Frozen encoders: specs, loading, fingerprints."""
