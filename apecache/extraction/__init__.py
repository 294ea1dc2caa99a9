"""Run frozen encoders once over a source and commit their features."""
