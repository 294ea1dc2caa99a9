"""How fast: ratios of CPU time between cases that are interleaved in one run."""
