"""Strict configuration: plain trees become checked dataclasses, and dataclasses become short content hashes."""
