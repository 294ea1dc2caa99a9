"""Sources of images and captions: opened, checked, read safely."""
