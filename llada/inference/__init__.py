"""Using a model: sampler flags, the denoising view, lm_eval."""
