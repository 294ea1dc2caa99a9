"""Tables of image-caption pairs and safe image reading."""
