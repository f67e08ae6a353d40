"""Streams: the same global batch however it is split, resumed or placed."""

import numpy as np
import pytest
import torch

from llada.diffusion.batches import Example
from llada.diffusion.stream import MaskedStream
from llada.run import Run

MASK, PAD = 99, 98
LENGTHS = np.array([3, 9, 5, 7, 4, 8, 6, 2, 9, 5])


def example_of(record_id, epoch, longest):
    length = LENGTHS[record_id]
    maskable = np.arange(length) >= 1  # the first token stands for a prompt
    return Example(np.arange(length) + 10 * record_id, maskable, weight=0.5, num_units=float(length))


def make_stream(**changes):
    fields = dict(
        example_of=example_of, lengths=LENGTHS, batch_size=8, micro_batch_size=8, seed=1,
        mask_id=MASK, pad_id=PAD, run=Run(rank=0, world_size=1, device=torch.device("cpu")),
    )  # fmt: skip
    return MaskedStream(**{**fields, **changes})


def as_rows(batches):
    """record id -> its noised tokens and weights, whatever the batches look like."""
    found = {}
    for batch in batches:
        length = batch.input_ids.shape[1]
        for b, record_id in enumerate(batch.record_ids):
            mine = (batch.rows // length) == b
            found[record_id] = (
                batch.input_ids[b, : LENGTHS[record_id]].tolist(),
                (batch.rows[mine] % length).tolist(),
                batch.targets[mine].tolist(),
                batch.weights[mine].tolist(),
            )
    return found


def split(world_size, micro_batch_size, step, **changes):
    batches = []
    for rank in range(world_size):
        run = Run(rank=rank, world_size=world_size, device=torch.device("cpu"))
        batches += make_stream(run=run, micro_batch_size=micro_batch_size, **changes)(step)
    return batches


@pytest.mark.parametrize("options", [{}, {"t_sampling": "stratified"}, {"mask_count": "exact"},
                                     {"t_sampling": "stratified", "mask_count": "exact"}])  # fmt: skip
def test_the_global_batch_does_not_depend_on_the_split(options):
    whole = as_rows(make_stream(**options)(3))
    assert whole == as_rows(split(1, 2, 3, **options)) == as_rows(split(2, 2, 3, **options))
    assert whole == as_rows(split(8, 1, 3, **options))


def test_ranks_see_different_records_and_noise():
    first, second = as_rows(split(2, 4, 0)[:1]), as_rows(split(2, 4, 0)[1:])
    assert not set(first) & set(second)


def test_a_stream_is_a_function_of_the_step():
    stream = make_stream()
    later = as_rows(stream(5))
    stream(0)
    assert as_rows(stream(5)) == later == as_rows(make_stream()(5))


def test_an_epoch_sees_every_record_once_and_again_with_other_noise():
    stream = make_stream(batch_size=10, micro_batch_size=5)
    first, second = as_rows(stream(0)), as_rows(stream(1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_noise_masks_only_maskable_tokens_and_weighs_them():
    for step in range(20):
        for record_id, (x_t, positions, targets, weights) in as_rows(make_stream()(step)).items():
            assert x_t[0] == 10 * record_id  # the prompt is never masked
            assert all(x_t[i] == MASK and target == 10 * record_id + i
                       for i, target in zip(positions, targets, strict=True))  # fmt: skip
            assert x_t.count(MASK) == len(positions)
            assert all(0.5 <= weight <= 500 for weight in weights)  # weight / p_mask with p_mask in [1e-3, 1]


def test_exact_counts_have_weight_n_over_l():
    for record_id, (_, positions, _, weights) in as_rows(make_stream(mask_count="exact")(0)).items():
        assert len(positions) >= 1
        assert weights == pytest.approx([0.5 * (LENGTHS[record_id] - 1) / len(positions)] * len(positions))


def test_stratified_times_cover_the_unit_interval():
    stream = make_stream(
        t_sampling="stratified",
        mask_count="exact",
        example_of=lambda *_: Example(np.zeros(1000, dtype=int), np.ones(1000, dtype=bool), 1.0, 1.0),
    )
    for step in range(5):
        (batch,) = stream(step)
        shares = np.bincount(batch.rows.numpy() // 1000, minlength=8) / 1000
        # one time in each eighth of a circle: neighbours are less than a quarter apart
        assert np.diff(np.sort(shares)).max() < 0.25 + 2e-3


def test_padding_is_on_the_right_and_not_attended():
    (batch,) = make_stream()(0)
    for b, record_id in enumerate(batch.record_ids):
        assert batch.attention_mask[b].tolist() == [1] * LENGTHS[record_id] + [0] * (9 - LENGTHS[record_id])
        assert (batch.input_ids[b, LENGTHS[record_id] :] == PAD).all()
    assert batch.num_units == LENGTHS[batch.record_ids].sum() == batch.num_tokens


def test_full_rows_need_no_attention_mask():
    stream = make_stream(
        lengths=np.full(8, 4),
        example_of=lambda record_id, *_: Example(np.arange(4), np.ones(4, dtype=bool), 1.0, 4.0),
    )
    (batch,) = stream(0)
    assert batch.attention_mask is None


def test_validation_masks_never_change_and_do_not_depend_on_the_ranks():
    stream = make_stream(micro_batch_size=3)
    once = as_rows(stream.validation())
    assert once == as_rows(stream.validation())
    assert sorted(once) == list(range(10))
    ranks = [make_stream(run=Run(rank=rank, world_size=3, device=torch.device("cpu"))) for rank in range(3)]
    batches = [batch for stream in ranks for batch in stream.validation()]
    assert once == as_rows([batch for batch in batches if batch.num_units])
    # ranks forward equally often, also where one has run out of records
    narrow = [make_stream(run=stream.run, micro_batch_size=1) for stream in ranks]
    assert [len(list(stream.validation())) for stream in narrow] == [4, 4, 4]
    assert sum(batch.num_units for stream in narrow for batch in stream.validation()) == LENGTHS.sum()
    assert sorted(as_rows(make_stream().validation(limit=4))) == [0, 1, 2, 3]


def test_a_share_of_the_batches_counts_as_full():
    longest = {}

    def example(record_id, epoch, length):
        longest.setdefault(length, []).append(record_id)
        return example_of(record_id, epoch, length)

    stream = make_stream(example_of=example, full_length=50, full_length_probability=0.25)
    for step in range(200):
        stream(step)
    # 200 batches of 8 records: a quarter of them, with a standard error of 3 %
    assert abs(len(longest[50]) / 1600 - 0.25) < 0.12
    assert set(longest) <= {7, 8, 9, 50}
