"""Decoding: from the bytes of an image file to RGB pixels."""
