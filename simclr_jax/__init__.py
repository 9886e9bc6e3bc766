"""SimCLR v1 and v2."""
