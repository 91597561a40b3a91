"""moesaic: sparse feed-forward layers by every published method, measured under one protocol."""
