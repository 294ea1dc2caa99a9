"""Alignment heads and their files."""
