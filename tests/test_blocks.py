"""Recomputed and compiled blocks give the same gradients, packed rows too, and keep what footprint says."""

import copy
import gc

import pytest
import torch
from torch import nn

from llada.flags.parser import parse
from llada.models.building import attach_lora
from llada.training.config import RowsConfig
from llada.training.cost import Ranks, block_bytes, count_parameters, memory
from llada.training.parallel import wrap_blocks
from modelling_final import LLaDAConfig, LLaDAModelLM

V, B, L = 64, 2, 32
BORDERS = torch.tensor([0, 10, 32, 50, 64], dtype=torch.int32)


def make_model(num_blocks=2, lora=False):
    torch.manual_seed(0)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=128, n_heads=4, n_kv_heads=2, n_layers=num_blocks, mlp_hidden_size=320, vocab_size=V,
            embedding_size=V, mask_token_id=1, eos_token_id=2, pad_token_id=2, max_sequence_length=L,
        )
    )  # fmt: skip
    if lora:
        model = attach_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["all-linear"], seed=0)
    return model.train()


def gradient(model, packed):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (B, L), generator=random)
    rows = torch.arange(0, B * L, 3)
    loss = model(
        input_ids=ids, rows=rows, targets=ids.flatten()[rows], weights=torch.ones(len(rows)),
        document_borders=BORDERS if packed else None,
    ).loss  # fmt: skip
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile's tracing without the minutes of code generation; counts the blocks."""
    blocks = []
    original = nn.Module.compile

    def compile(self):
        blocks.append(self)
        original(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    return blocks


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_gradients_are_the_same_however_blocks_run(lora, packed, quick_compiler):
    plain = make_model(lora=lora)
    expected = gradient(copy.deepcopy(plain), packed)
    for recompute in ("none", "selective", "full"):
        for compiled in (False, True):
            model = copy.deepcopy(plain)
            wrap_blocks(model, activation_checkpointing=recompute, compile=compiled)
            found = gradient(model, packed)
            assert (found - expected).norm() < 1e-6 * expected.norm(), (recompute, compiled)
    assert len(quick_compiler) == 3 * 2


def alive():
    """All tensors that Python knows of, but for a compiler's stand-ins."""
    things = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    return [thing for thing in things if not torch._is_functional_tensor(thing)]


def kept_bytes(num_blocks, recompute):
    """Bytes of what a forward leaves behind for its backward."""
    model = make_model(num_blocks)
    wrap_blocks(model, activation_checkpointing=recompute, compile=False)
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(input_ids=torch.zeros(B, L, dtype=torch.long)).last_hidden_state
    for tensor in alive():  # what selective checkpointing keeps lies in dictionaries of its own
        keep(tensor)
    del out
    old = {tensor.untyped_storage().data_ptr() for tensor in before}
    return sum(size for pointer, size in storages.items() if pointer not in old)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_memory_of_recomputed_blocks_is_what_is_kept(recompute):
    random_state = torch.get_rng_state().numel()  # once a block, whatever its size
    per_block = (kept_bytes(3, recompute) - kept_bytes(2, recompute) - random_state) / (B * L)
    config = RowsConfig(output_dir="", activation_checkpointing=recompute, batch_size=B, micro_batch_size=B)
    found = []
    for num_blocks in (2, 3):
        model = make_model(num_blocks)
        found.append(
            memory(model.config, config, count_parameters(model), Ranks(1, 1), length=L)["activations"]
        )
    assert (found[1] - found[0]) / (B * L) == pytest.approx(per_block, rel=0.03)
    everything, _ = block_bytes(model.config, config, count_parameters(model))
    assert per_block < everything * (0.5 if recompute == "selective" else 0.15)


def test_the_old_flag_means_full():
    assert parse(RowsConfig, ["--output_dir", "x"]).activation_checkpointing == "none"
    older = parse(RowsConfig, ["--output_dir", "x", "--gradient_checkpointing"])
    assert older.activation_checkpointing == "full"
