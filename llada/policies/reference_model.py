"""The reference model of DPO, KTO and GRPO: what the policy is compared with, frozen."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llada.diffusion.bound_gradient import adapter_off, disable_dropout, draw_values
from llada.models.building import has_fresh_adapter, start_model
from llada.models.checkpoints import load_model
from llada.policies.answer_stream import AnswerStream
from llada.policies.config import PolicyConfig
from llada.run import Run, autocast, sum_over_ranks
from llada.training.parallel import parallelize

Reference = Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]]
"""policy -> a context that holds the reference model."""


def make_reference(config: PolicyConfig, run: Run) -> Reference:
    """Where the reference is found: --ref_model_name_or_path, or the policy as it starts.

    The latter needs a second copy of the weights, except with fresh LoRA adapters, which are switched off
    instead.
    """
    # Adapters that training starts from are not fresh: without them the model would be another one.
    if config.ref_model_name_or_path is None and has_fresh_adapter(config):
        return _without_adapter
    model = load_frozen(config)
    if config.shard == "none":
        model.to(run.device)
    else:
        model = parallelize(
            model, run, shard=config.shard, dtype=config.dtype, cpu_offload=config.cpu_offload
        )
    return lambda _: nullcontext(model)


@contextmanager
def _without_adapter(policy: torch.nn.Module) -> Iterator[torch.nn.Module]:
    with adapter_off(policy):
        yield policy


def load_frozen(config: PolicyConfig) -> torch.nn.Module:
    """The reference's weights, without gradients and without dropout."""
    if config.ref_model_name_or_path is None:
        model = start_model(config)  # its adapter not merged, as in the policy: merged, weights round
    else:
        model = load_model(
            config.ref_model_name_or_path,
            # the same precision as the policy's, so that equal weights give equal numbers
            dtype=config.dtype if config.use_lora else "float32",
            attn_implementation=config.attn_implementation,
        )
    disable_dropout(model)
    return model.eval().requires_grad_(False)


def precompute_reference(
    stream: AnswerStream, config: PolicyConfig, run: Run, policy: torch.nn.Module, cache: Path
) -> np.ndarray:
    """[num_records, answers of a record] B_ref under the masks of epoch 0, in nats.

    Kept in `cache`, so that a resumed run compares with the same numbers.

    Args:
        policy: the model before training; it is the reference unless the flags name another one.
    """
    described = {
        "reference": config.ref_model_name_or_path or config.model_name_or_path,
        "dtype": config.dtype,
        "seed": config.seed,
        "num_draws": stream.num_draws,
        "lengths": hashlib.sha256(np.ascontiguousarray(stream.lengths).tobytes()).hexdigest()[:16],
    }
    key = json.dumps(described, sort_keys=True)
    if cache.is_file():
        with np.load(cache) as saved:
            if str(saved["key"]) == key:
                return saved["values"]
    model = policy if config.ref_model_name_or_path is None else load_frozen(config)
    model.to(run.device)
    found: dict[int, list[float]] = {}
    width = 0
    batches = tqdm(
        list(range(0, len(stream.lengths), run.world_size * stream.micro_batch_size)),
        desc="reference", unit="batch", disable=not run.is_main, mininterval=2,
    )  # fmt: skip
    for _, (batch, ids) in zip(batches, stream.all_records(), strict=True):
        with autocast(run.device, config.dtype):
            values = draw_values(model, batch.to(run.device).chunks).sum(0)
        rows = values.view(len(batch.record_ids), -1)
        width = rows.shape[1]
        found |= dict(zip(ids, rows.tolist(), strict=False))  # a rank out of records has one that counts not
    flat = np.zeros((len(stream.lengths), width))
    for record_id, row in found.items():
        flat[record_id] = row
    flat = np.array(sum_over_ranks(flat.reshape(-1).tolist())).reshape(flat.shape)
    if config.shard != "none":
        model.cpu()  # sharding starts from there
    if run.is_main:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, values=flat, key=key)
    return flat
