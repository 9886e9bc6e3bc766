"""Augmentation: what is drawn for each view, and the operations that apply it."""
