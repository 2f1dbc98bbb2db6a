"""Configuration, the training loop, checkpoints and evaluation."""
