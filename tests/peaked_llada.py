"""A tiny model for tests of the sampler: sure of itself, and ending some of its answers."""

import torch

from tiny_llada import make_model

SMALL = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24}
EOS, EOT, PAD = 25, 1, 0  # tokens that the random model likes, so that answers end
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]


def peaked_model(*, sharpness=3.0, **changes):
    """A random model whose predictions are as sure as a trained one's."""
    model = make_model(**{"eos_token_id": EOS, "eot_token_id": EOT, "pad_token_id": PAD} | SMALL | changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model.requires_grad_(False)


def answers(output, gen_length):
    return output.sequences[:, -gen_length:].tolist()


class Spy(torch.nn.Module):
    """Passes everything on to a model, and notes what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.generation_config = model.generation_config
        self.sequences, self.columns, self.wanted = [], [], []

    def forward(self, **inputs):
        self.sequences.append(inputs["input_ids"].shape[0])
        self.columns.append(inputs["input_ids"].shape[1])
        self.wanted.append(inputs["query_positions"].shape[1])
        return self.model(**inputs)
