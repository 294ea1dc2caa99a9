"""Train within encoders: freezing rules, adapters, dual and shared encoders."""
