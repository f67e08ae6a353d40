"""Speculative decoding: LLaDA drafts, an AR model verifies."""
