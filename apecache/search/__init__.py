"""Search: FAISS indexes of embeddings and queries on them."""
