"""What the pretraining methods share: data, models, training loop, evaluation and export."""
