"""Many small heads trained together as one stacked model."""
