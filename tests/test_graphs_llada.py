"""Recorded forwards: the same tokens, one recording for each shape, and none that outlives its cache.

The recording itself needs a GPU; here a recording is a function that is called again on the same buffers.
"""

import pytest
import torch

from modelling_final import graphs_llada
from modelling_final.generation_llada import generate
from peaked_llada import PROMPTS, answers, peaked_model
from test_decoding_llada import MODES


@pytest.fixture(scope="module")
def model():
    return peaked_model().double()


@pytest.fixture
def recordings(monkeypatch):
    """Lets the CPU stand in for the GPU; how often each recording was replayed."""
    counts = []

    def record(run):
        result = run().clone()
        counts.append(0)
        index = len(counts) - 1

        def replay():
            counts[index] += 1
            result.copy_(run())

        return replay, result

    monkeypatch.setattr(graphs_llada, "DEVICE", "cpu")
    monkeypatch.setattr(graphs_llada, "record", record)
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_plain_forwards(model, recordings, mode):
    settings = {"gen_length": 16, "block_length": 8, **MODES[mode]}
    plain = generate(model, PROMPTS, **settings)
    assert not recordings
    recorded = generate(model, PROMPTS, **settings, cuda_graphs=True)
    assert answers(recorded, 16) == answers(plain, 16)
    assert torch.equal(recorded.steps, plain.steps) and recorded.forwards == plain.forwards


def test_one_recording_serves_all_blocks_without_a_cache(model, recordings):
    generate(model, PROMPTS, gen_length=16, block_length=4, early_stop=False, cuda_graphs=True)
    assert recordings == [15]  # the first of 16 forwards ran as it is


def test_each_blocks_cache_has_its_own_recording(model, recordings):
    settings = {"gen_length": 16, "block_length": 8, "early_stop": False, "cuda_graphs": True}
    generate(model, PROMPTS, cache="dual", **settings)
    assert recordings == [6, 6]  # of 8 forwards one fills the cache and one runs as it is


def test_shapes_that_come_once_are_not_recorded(model, recordings):
    settings = {"gen_length": 8, "block_length": 4, "steps": 2, "early_stop": False, "cuda_graphs": True}
    generate(model, PROMPTS, method="semi_autoregressive_origin", **settings)
    assert recordings == []


def test_a_model_on_the_cpu_is_refused(model):
    with pytest.raises(ValueError, match="cuda_graphs needs a model on a GPU; this one is on cpu"):
        generate(model, PROMPTS, gen_length=4, cuda_graphs=True)
