"""Pixels to embeddings: decoding, detection, alignment, quality, the embedder."""
