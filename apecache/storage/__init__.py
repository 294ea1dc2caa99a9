"""Where bytes live: files on a disk and objects in a bucket."""
