"""Batches: reading, decoding and transfer to the devices, ahead of the training step."""
