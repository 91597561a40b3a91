"""Stages with identities, their cache on disk, their status, and the record of an experiment."""
