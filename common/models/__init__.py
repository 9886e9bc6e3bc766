"""Encoders, projection heads and the online probe."""
