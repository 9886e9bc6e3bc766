"""Evaluation of frozen and fine-tuned encoders: kNN, linear, transfer, embeddings."""
