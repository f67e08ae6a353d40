"""A mask predictor in float64 with the interface of LLaDAModelLM, small enough to enumerate all it can say.

Its likelihoods keep their graph, so a test can write down the same number in one pass and differentiate it.
"""

from types import SimpleNamespace

import torch

V, MASK = 4, 4  # tokens 0..3, and the mask


class ExactModel(torch.nn.Module):
    """Two layers over all positions of a sequence of at most `length` tokens; nothing in it is float32."""

    def __init__(self, length=6, width=8, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def new(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64) * 0.7)

        self.embedding, self.mixing = new(length, V + 1, width), new(length, length, width)
        self.head = new(length, width, V)

    def log_probs(self, input_ids, attention_mask=None):
        """[B, L, V] log p of each position given all others as they stand."""
        length = input_ids.shape[1]
        hidden = self.embedding[torch.arange(length), input_ids]
        if attention_mask is not None:
            hidden = hidden * attention_mask[:, :, None]
        mixed = torch.tanh(torch.einsum("bjd,ijd->bid", hidden, self.mixing[:length, :length]) + hidden)
        return torch.einsum("bid,idv->biv", mixed, self.head[:length]).log_softmax(-1)

    def forward(self, input_ids, attention_mask=None, rows=None, targets=None, weights=None):
        log_p = self.log_probs(input_ids, attention_mask).flatten(0, 1)[rows]
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        return SimpleNamespace(loss=None if weights is None else (weights * nll).sum(), nll=nll.detach())
