"""Claims of papers as laws that can be run: which of them hold for these encoders and this data."""
