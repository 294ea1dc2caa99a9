"""Open sources of images and captions, check them, and read them safely."""
