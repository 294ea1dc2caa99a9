"""Laws: what was measured, and the table of it."""
