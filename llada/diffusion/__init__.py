"""The method: noise, streams of noised batches, losses, bounds and their gradients."""
