"""Run extractions and sweeps on a Ray cluster."""
