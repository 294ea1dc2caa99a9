"""What one GPU reaches, beside the ceilings of that card measured in the same run."""
