"""Costs that are computed from counts and assumed rates, not measured."""
