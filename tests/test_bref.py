"""ELBO-KTO's seeds, masks and records: the published program's vectors, and what is refused."""

import json

import numpy as np
import pytest
import torch

from llada.models.checkpoints import describe_checkpoint
from llada.policies.kto_reference import (
    base_seed,
    check_fingerprint,
    derive_seed,
    draw_masks,
    find_masks,
    mask_checks,
    mask_sizes,
    plan_of,
    prefix_means,
)

# made with the published program, torch 2.13 CPU
VECTORS = {
    0: (1836240733674579119, [16, 30, 27, 98, 33, 13, 23, 72]),
    1: (9699962801750783722, [36, 74, 77, 20, 89, 55, 9, 82]),
    13499: (7047306326056583813, [13, 91, 96, 87, 13, 33, 79, 32]),
}


@pytest.mark.parametrize("index", VECTORS)
def test_seeds_and_sizes_are_those_of_the_published_program(index):
    seed, sizes = VECTORS[index]
    assert base_seed(index) == seed
    assert mask_sizes(seed, 100, 8) == sizes


def test_masks_are_those_of_the_published_program_on_a_cpu():
    base = base_seed(0)
    assert [derive_seed(base, k, 1) for k in (1, 2)] == [3108806181078982235, 15622976677008680387]
    masks = draw_masks(base, [20], 2)
    assert masks.sum(axis=1).tolist() == [16, 10]
    assert (np.flatnonzero(masks[1]) + 10).tolist() == [13, 18, 21, 22, 23, 24, 25, 26, 27, 29]
    assert mask_checks(masks, 10)["masked_idx_sums"] == [329, 228]


def test_sizes_are_uniform_and_every_token_is_masked_equally_often():
    num_tokens, num_records = 8, 2000
    masks = np.concatenate([draw_masks(base_seed(i), [num_tokens], 2) for i in range(num_records)])
    counts = np.bincount(masks.sum(axis=1), minlength=9)[1:]
    expected = len(masks) / num_tokens
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi^2 with 7 degrees of freedom, p = 0.001
    share, truth = masks.mean(axis=0), (num_tokens + 1) / 2 / num_tokens
    # l and the mask given l: the variance of one indicator is that of a coin with probability E[l] / T
    assert np.abs(share - truth).max() < 4 * np.sqrt(truth * (1 - truth) / len(masks))


def test_edges():
    assert mask_sizes(base_seed(3), 0, 2) == [0, 0] and draw_masks(base_seed(3), [0], 2).shape == (2, 0)
    assert draw_masks(base_seed(3), [1], 4).all()
    plan = plan_of(draw_masks(base_seed(0), [20], 2), [20])
    assert plan.weights.tolist() == [20 / 16, 20 / 10]


def test_prefix_means_are_the_means_of_the_first_draws():
    values = np.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(prefix_means(values), [values[:k].mean(axis=0) for k in range(1, 5)])


def record_of(index=5, num_tokens=12, prompt_length=7):
    base = base_seed(index)
    return {
        "seed": str(base),
        "l_values": mask_sizes(base, num_tokens, 4),
        "prompt_length": prompt_length,
        **mask_checks(draw_masks(base, [num_tokens], 4), prompt_length),
    }


def test_a_record_is_recognised_by_its_sums_and_its_hashes():
    record = record_of()
    expected = draw_masks(base_seed(5), [12], 4)
    assert (find_masks(record, [12], 4, "f:1", verify=True) == expected).all()
    published = {name: value for name, value in record.items() if name != "mask_hashes"}
    assert (find_masks(published, [12], 2, "f:1", verify=True) == expected[:2]).all()
    with pytest.raises(ValueError, match=r"f:1: l_values .* answer of 11 tokens"):
        find_masks(record, [11], 4, "f:1", verify=True)
    for name in ("masked_idx_sums", "mask_hashes"):
        changed = {**record, name: [type(record[name][0])(int(record[name][0]) + 1), *record[name][1:]]}
        with pytest.raises(ValueError, match="--disable_mask_verification"):
            find_masks(changed, [12], 4, "f:1", verify=True)
        assert (find_masks(changed, [12], 4, "f:1", verify=False) == expected).all()


def test_sums_alone_would_miss_some_masks():
    one, other = np.zeros((2, 1, 6), dtype=bool)
    one[0, [0, 3]] = other[0, [1, 2]] = True
    checks = [mask_checks(mask, 0) for mask in (one, other)]
    assert checks[0]["masked_idx_sums"] == checks[1]["masked_idx_sums"]
    assert checks[0]["mask_hashes"] != checks[1]["mask_hashes"]


def test_a_checkpoint_is_recognised_by_its_weights(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        weights = np.arange(1 << 21) + (name == "other")  # 16 MiB: more than is read at once
        (tmp_path / name / "model.safetensors").write_bytes(weights.tobytes())
        (tmp_path / name / "config.json").write_text(json.dumps({"transformers_version": name}))
    found = {name: describe_checkpoint(tmp_path / name) for name in ("one", "same", "other")}
    assert found["one"] == found["same"] != found["other"]


def test_a_fingerprint_names_what_differs():
    made = {"model": "a", "eos": "one", "dtype": "float32"}
    check_fingerprint(made, made, "f:1")
    with pytest.raises(ValueError, match=r"f:1: B_ref was made differently: model was 'a', is 'b'"):
        check_fingerprint(made, {**made, "model": "b"}, "f:1")


def test_masks_do_not_depend_on_global_randomness():
    torch.manual_seed(1)
    one = draw_masks(base_seed(9), [30], 8)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert (one == draw_masks(base_seed(9), [30], 8)).all()
    torch.set_rng_state(state)
