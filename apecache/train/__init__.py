"""Training on cached features."""
