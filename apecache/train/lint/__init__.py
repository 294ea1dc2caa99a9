"""Checks for the traps of published training code."""
