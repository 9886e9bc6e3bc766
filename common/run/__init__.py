"""What a run writes: checkpoints, metrics, config, console output."""
