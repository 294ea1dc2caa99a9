"""Export a run to other programs, one module per file format."""
