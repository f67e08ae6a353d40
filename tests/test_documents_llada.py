"""Documents in one row are computed as if each stood alone: logits, loss and gradients, by every kernel."""

import pytest
import torch
from torch.testing import assert_close

from modelling_final import WindowCache
from modelling_final.documents_llada import Documents, document_attention, document_positions
from tiny_llada import V, make_model

LENGTHS = [[5, 7], [3, 1, 6, 2], [12]]  # three rows of 12
BORDERS = torch.tensor([0, 5, 12, 15, 16, 22, 24, 36])
IDS = torch.randint(1, V, (3, 12), generator=torch.Generator().manual_seed(1))


def alone(model, flat):
    """`flat` of each document computed in a row of its own, laid out as the packed rows are."""
    pieces = IDS.flatten().split([length for row in LENGTHS for length in row])
    return torch.cat([flat(model, ids[None])[0] for ids in pieces])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"logit_shift": True},
        {"attention_pattern": "block_causal", "attention_block_size": 2},
    ],
    ids=["plain", "gqa", "shifted", "block causal"],
)  # fmt: skip
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_packed_logits_are_those_of_each_document_alone(kernel, changes):
    model = make_model(kernel=kernel, **changes)
    # Which rows see which is tested, not the compiler: its code for CPUs depends on the kind of CPU.
    with torch.compiler.set_stance("force_eager"):
        packed = model(IDS, document_borders=BORDERS).logits.flatten(0, 1)
    expected = alone(make_model(**changes), lambda model, ids: model(ids).logits)
    assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_packed_gradients_are_those_of_each_document_alone():
    rows = torch.arange(0, 36, 2)
    targets, weights = IDS.flatten()[rows], torch.linspace(0.1, 2, len(rows))
    gradients = []
    for packed in (True, False):
        model = make_model()
        if packed:
            model(IDS, document_borders=BORDERS, rows=rows, targets=targets, weights=weights).loss.backward()
        else:
            logits = alone(model, lambda model, ids: model(ids).logits)
            nll = torch.nn.functional.cross_entropy(logits[rows], targets, reduction="none")
            (nll * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_positions_count_from_zero_in_each_document_and_empty_ones_change_nothing():
    expected = [[*range(5), *range(7)], [*range(3), 0, *range(6), *range(2)], [*range(12)]]
    assert document_positions(BORDERS, 3, 12).tolist() == expected
    padded = torch.cat([BORDERS, torch.full((5,), 36)])
    assert document_positions(padded, 3, 12).tolist() == expected
    model = make_model()
    with torch.no_grad():
        assert torch.equal(
            model(IDS, document_borders=BORDERS).logits, model(IDS, document_borders=padded).logits
        )


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        (torch.tensor([0, 5, 36]), "sequence 1 does not begin"),
        (torch.tensor([0, 12, 24, 30]), "must rise from 0 to 36"),
        (torch.tensor([0, 24, 12, 36]), "must rise"),
        (torch.tensor([0.0, 12, 24, 36]), "vector of integers"),
    ],
)
def test_bad_borders_are_refused(borders, message):
    with pytest.raises(ValueError, match=message):
        make_model()(IDS, document_borders=borders)


def test_documents_are_refused_where_they_would_be_ignored():
    model = make_model()
    with pytest.raises(ValueError, match="document_borders go with no attention_mask"):
        model(IDS, document_borders=BORDERS, attention_mask=torch.ones(3, 12))
    with pytest.raises(ValueError, match="with no cache"):
        model(IDS, document_borders=BORDERS, past_key_values=WindowCache(model.config))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="here flash_attention_2"):
        model(IDS, document_borders=BORDERS)


@pytest.mark.gpu
def test_the_variable_length_kernel_agrees_with_one_call_per_document():
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 12, 64, generator=random) for heads in (4, 2, 2))
    options = {"scaling": 0.125, "dropout": 0.0}
    expected = document_attention(query, key, value, Documents(BORDERS), **options)
    on_gpu = (x.cuda().bfloat16() for x in (query, key, value))
    found = document_attention(*on_gpu, Documents(BORDERS.cuda()), **options)
    assert_close(found.float().cpu(), expected, atol=3e-2, rtol=3e-2)
