"""Pairs of tiny models for tests of speculative decoding, and bridges that need no tokenizer."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llada.models.causal_layout import convert
from llada.speculative.bridge import Bridge

FLOAT64 = torch.float64


def make_verifier(num_tokens, *, eos_id=None, dtype=FLOAT64, seed=0, **changes):
    """A random Llama, its logits sharpened so that greedy outputs vary with the text."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}
    config = LlamaConfig(
        vocab_size=num_tokens, bos_token_id=None, eos_token_id=eos_id, pad_token_id=eos_id, **shape | changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.35)
    model.generation_config.do_sample = False
    return model


def make_drafter(verifier, tokenizer, *, noise=0.0, causal=True, seed=1):
    """The verifier as a LLaDA model: causal and without noise it drafts what the verifier says.

    The tokenizer gets a mask token behind the verifier's ids.
    """
    source = copy.deepcopy(verifier)
    model = convert(source, tokenizer, logit_shift=True)
    model.config.max_sequence_length = 128
    if causal:
        model.config.attention_pattern, model.config.attention_block_size = "block_causal", 1
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    return model


class IdsOnly(Bridge):
    """One vocabulary of ids 0 ... V - 1, with the mask as id V of the drafter."""

    def __init__(self, num_tokens, mask_id=None):
        self.kind, self.mask_id, self.size = "none", num_tokens if mask_id is None else mask_id, num_tokens
        self.allowed = self.drawn_as = self.feeds = torch.arange(num_tokens)

    def canvas_answer(self, answer):
        return list(answer)
