"""Corpora of documents, tokenizers trained on them, and their memory-mapped token splits."""
