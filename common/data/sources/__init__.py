"""Datasets: folders, TFDS, shards, the embedded one and random images."""
