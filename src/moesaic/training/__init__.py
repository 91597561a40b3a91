"""Exactly resumable training: batches addressed by their number, and Lightning fits that continue bit for bit."""
