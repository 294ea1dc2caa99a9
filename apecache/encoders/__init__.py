"""Load frozen encoders, and fingerprint them."""
