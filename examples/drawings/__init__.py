"""Drawings of single words with their captions: the data of `apecache demo`. See ATTRIBUTION.md."""
