"""The reference model of DPO, KTO and GRPO: what the policy is compared with, frozen."""

import hashlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llada.diffusion.bound_gradient import disable_dropout, draw_values
from llada.models.adapters import Reference, without_adapter
from llada.models.building import has_fresh_adapter, settle_blocks, start_model
from llada.models.checkpoints import describe_checkpoint, is_meta, load_model
from llada.policies.answer_stream import AnswerStream
from llada.policies.config import PolicyConfig
from llada.resumable import ResumableJob
from llada.run import Run, autocast, barrier
from llada.training.parallel import parallelize, spread


def make_reference(config: PolicyConfig, run: Run) -> Reference:
    """Where the reference is found: --ref_model_name_or_path, or the policy as it starts."""
    # Fresh adapters are switched off, which saves a second copy of the weights.
    # Adapters that training starts from are not fresh: without them the model would be another one.
    if config.ref_model_name_or_path is None and has_fresh_adapter(config):
        return without_adapter
    model = parallelize(
        load_frozen(config, run), run, shard=config.shard, dtype=config.dtype, cpu_offload=config.cpu_offload
    )
    return lambda _: nullcontext(model)


def load_frozen(config: PolicyConfig, run: Run) -> torch.nn.Module:
    """The reference on `run.build_device`, without gradients and without dropout."""
    device = run.build_device
    if config.ref_model_name_or_path is None:
        # its adapter not merged, as in the policy: merged, weights round
        model = start_model(config, device=device)
    else:
        model = load_model(
            config.ref_model_name_or_path,
            # the same precision as the policy's, so that equal weights give equal numbers
            dtype=config.dtype if config.use_lora else "float32",
            attn_implementation=config.attn_implementation,
            device=device if is_meta(device) else None,
        )
        settle_blocks(config, model.config)
    disable_dropout(model)
    return model.eval().requires_grad_(False)


def precompute_reference(
    stream: AnswerStream, config: PolicyConfig, run: Run, policy: torch.nn.Module, folder: Path
) -> np.ndarray:
    """[num_records, answers of a record] B_ref under the masks of epoch 0, in nats.

    Kept in `folder`, so that a killed run goes on and a resumed one compares with the same numbers. `policy`:
    the model before training; it is the reference unless the flags name another one.
    """
    is_policy = config.ref_model_name_or_path is None
    starts = (config.model_name_or_path, config.sft_adapter_path)
    settings = {
        "reference": describe_checkpoint(*(starts if is_policy else [config.ref_model_name_or_path])),
        **{name: getattr(config, name) for name in ("dtype", "seed", "num_masks")},
        **({"block_size": config.block_size} if config.block_size else {}),
        "lengths": hashlib.sha256(stream.lengths.astype(np.int64).tobytes()).hexdigest()[:16],
    }
    job = ResumableJob(folder, settings, rank=run.rank, world_size=run.world_size)
    keys = [job.key(n) for n in range(len(stream.lengths))]
    missing = job.share(keys)
    model = policy if is_policy else load_frozen(config, run)
    spread(model, run)
    stride = stream.micro_batch_size
    for start in tqdm(
        range(0, len(missing), stride), desc="reference", disable=not run.is_main, mininterval=2
    ):
        batch = stream.batch_of(missing[start : start + stride]).to(run.device)
        with autocast(run.device, config.dtype):
            values = draw_values(model, batch.chunks).sum(0)
        for n, row in zip(batch.record_ids, values.view(len(batch.record_ids), -1), strict=True):
            job.put(keys[n], row.tolist())
    barrier()
    job.read()
    return np.array([job[key] for key in keys])
