"""From files to batches on the devices."""
