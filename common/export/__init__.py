"""The encoder of a run for other libraries: arrays under torchvision's names, and StableHLO."""
