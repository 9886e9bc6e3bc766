"""MoCo v1 and v2."""
