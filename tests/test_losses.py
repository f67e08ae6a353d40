"""The training loss against exact sums over every mask: no sampling, no tolerance for luck."""

import itertools
import math

import numpy as np
import pytest
import torch

from llada.diffusion.batches import Example, Noised, collate
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.masking import mask_probability
from llada.diffusion.stream import MaskedStream
from llada.run import Run
from llada.training.config import RowsConfig
from llada.training.rows_stage import validation_loss
from tiny_llada import V, make_model

MASK = V - 1
TOKENS = np.array([3, 7, 7, 12])
CPU = Run(rank=0, world_size=1, device=torch.device("cpu"))


def all_masks(length):
    return [np.array(mask, dtype=bool) for mask in itertools.product([False, True], repeat=length)]


def negative_log_likelihoods(model, mask):
    """nll of each masked token, from the full logits in float64: the definition, without our loss code."""
    x_t = torch.from_numpy(np.where(mask, MASK, TOKENS))[None]
    log_p = model(input_ids=x_t).logits[0].double().log_softmax(-1)
    return {i: -float(log_p[i, TOKENS[i]]) for i in np.flatnonzero(mask)}


def expected_loss(model, t):
    """E over all masks at time t of the loss that `masked_diffusion_loss` computes, by its own code path."""
    p_mask = mask_probability(t)
    example = Example(TOKENS, np.ones(4, dtype=bool), weight=1.0, num_units=4.0)
    total = 0.0
    for mask in all_masks(4):
        probability = p_mask ** mask.sum() * (1 - p_mask) ** (~mask).sum()
        batch = collate([[Noised(example, mask, 1 / p_mask, 0)]], mask_id=MASK, pad_id=0)
        total += probability * float(masked_diffusion_loss(model, batch, batch.num_units).detach())
    return total


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_the_loss_is_the_sum_over_all_masks(t):
    model = make_model()
    p_mask = mask_probability(t)
    exact = 0.0
    for mask in all_masks(4):
        probability = p_mask ** mask.sum() * (1 - p_mask) ** (~mask).sum()
        exact += probability * sum(negative_log_likelihoods(model, mask).values()) / p_mask / 4
    assert expected_loss(model, t) == pytest.approx(exact, rel=1e-6)


def test_averaged_over_time_it_is_the_bound():
    # -ELBO / L = (1/L) sum over masks of sum(nll) / (l C(L, l)), which the average over p in (0, 1) equals
    model = make_model()
    exact = sum(
        sum(negative_log_likelihoods(model, mask).values()) / (mask.sum() * math.comb(4, mask.sum()))
        for mask in all_masks(4)
        if mask.any()
    ) / 4  # fmt: skip
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for polynomials in p of degree 15
    p = (nodes + 1) / 2
    times = (p - 1e-3) / (1 - 1e-3)
    average = sum(w / 2 * expected_loss(model, t) for t, w in zip(times, weights, strict=True))
    assert average == pytest.approx(exact, rel=1e-5)


def test_a_uniform_model_scores_log_vocabulary():
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert expected_loss(model, 0.4) == pytest.approx(math.log(V), rel=1e-6)


def make_stream(micro_batch_size, mask_count="exact"):
    def example_of(record_id, epoch, longest):
        return Example(
            TOKENS[: 2 + record_id % 3], np.ones(2 + record_id % 3, dtype=bool), 1.0, 2.0 + record_id % 3
        )

    lengths = np.array([2 + i % 3 for i in range(6)])
    return MaskedStream(example_of, lengths, 6, micro_batch_size, 0, CPU, MASK, 0, mask_count=mask_count)


def test_validation_is_unbiased_for_the_bound():
    """The mean over many seeds of the fixed masks is the exact bound of the records, within 4 standard
    errors."""
    model = make_model()
    config = RowsConfig(output_dir="", dtype="float32")
    values = []
    for seed in range(150):
        stream = make_stream(6)
        stream.seed = seed
        values.append(validation_loss(model, stream=stream, config=config, run=CPU))
    exact = 0.0
    for length in (2, 3, 4):
        for mask in all_masks(length):
            if mask.any():
                x_t = torch.from_numpy(np.where(mask, MASK, TOKENS[:length]))[None]
                log_p = model(input_ids=x_t).logits[0].log_softmax(-1)
                nll = -sum(float(log_p[i, TOKENS[i]]) for i in np.flatnonzero(mask))
                exact += 2 * nll / (mask.sum() * math.comb(length, mask.sum()))
    exact /= 18
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - exact) < 4 * error
    assert error < 0.05


def test_validation_does_not_depend_on_the_micro_batch():
    model, config = make_model(), RowsConfig(output_dir="", dtype="float32")
    whole, split = (validation_loss(model, stream=make_stream(n), config=config, run=CPU) for n in (6, 1))
    assert whole == pytest.approx(split, rel=1e-6)
