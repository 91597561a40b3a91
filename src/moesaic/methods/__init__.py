"""Methods: how a dense model becomes a sparse one, and what is trained on the way (one file per recipe)."""
