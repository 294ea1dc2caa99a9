"""What a fit minimises, on batches of embeddings."""
