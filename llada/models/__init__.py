"""Checkpoints, tokenizers, and the one build of a run's model."""
