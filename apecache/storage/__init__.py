"""Store bytes: files on a disk and objects in a bucket."""
