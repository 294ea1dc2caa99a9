"""A run in other programs: one file format each."""
