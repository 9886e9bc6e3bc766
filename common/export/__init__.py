"""The encoder of a run for other libraries: arrays under their names, and StableHLO."""
