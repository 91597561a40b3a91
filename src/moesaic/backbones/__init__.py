"""Dense models to start from: loaded, imported or pretrained on the spot."""
