"""Recipes: what trains, on what, how."""
