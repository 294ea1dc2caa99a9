"""Check fits for the traps of published training code."""
