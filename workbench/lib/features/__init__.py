"""Features: crosses and embeddings for recommendation. One file per system."""
