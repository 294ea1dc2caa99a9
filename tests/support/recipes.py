"""The recipe that tests of trainers share."""

from pathlib import Path

SMALL = str(Path(__file__).with_name("small.toml"))
"""A file: two linear heads of a few dimensions."""
