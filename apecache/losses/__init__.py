"""What a fit minimizes, on batches of embeddings."""
