"""How good: retrieval and zero-shot figures on real data."""
