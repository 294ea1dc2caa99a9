"""Answer questions about one's own data: the best heads, what would help, which pairs are wrong."""
