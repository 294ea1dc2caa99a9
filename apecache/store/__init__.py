"""Store features: plain Zarr v3 plus one immutable record per committed shard."""
