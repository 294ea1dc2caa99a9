"""Measurements. Each module prints a table and writes benchmarks/results/<area>-<name>.json."""
