"""The anatomy of dense feed-forward layers: read, find and replace them in any Hugging Face model."""
