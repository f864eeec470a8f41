"""A trained model at work: captions, matches, embeddings, search."""
