"""apecache: an embedding cache and head trainer for image-text models."""
