"""Peak memory in bytes of a DPO and a KTO step with 1 and with 8 masks, activations above all.

Prints {"dpo": {"1": ..., "8": ...}, "kto": ...}. A program of its own: what is measured is the process.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from conftest import load_script
from llada.diffusion.bound_gradient import make_draws, plan_draws
from llada.diffusion.likelihood import Request
from llada.diffusion.settings import MaskSettings
from llada.policies.answer_stream import AnswerBatch
from llada.policies.pairs import PairStage
from llada.training.monitor import peak_resident
from tiny_llada import make_model

NUM_ANSWERS, LENGTH = 8, 100


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_step(stage, num_draws):
    """A step's loss with all its parts, for a policy and numbers in place of a reference."""
    flags = {"model_name_or_path": "x", "output_dir": "x", "num_masks": num_draws}
    if stage == "dpo":
        script = load_script("rlhf/train_dpo.py")
        config = script.Config(train_data_path=["x"], **flags)
        return PairStage(config, partial(script.dpo, config)).step_loss
    script = load_script("rlhf/train_elbo_kto.py")
    return script.KtoLoss(script.Config(train_data_path="x", **flags)).step


def make_batch(num_draws):
    random = np.random.default_rng(0)
    texts = random.integers(1, 30, (NUM_ANSWERS, 2, LENGTH))
    requests = [Request(tuple(x), tuple(y), str(n)) for n, (x, y) in enumerate(texts)]
    plans = plan_draws(requests, MaskSettings(num_draws, "iid"), 0, "memory")
    numbers = {
        "b_ref": torch.zeros(NUM_ANSWERS, dtype=torch.float64),
        "is_desirable": torch.tensor([1.0, 0.0] * (NUM_ANSWERS // 2)),
    }
    draws = make_draws(requests, plans, num_draws, mask_id=39, pad_id=0)
    return AnswerBatch(
        [draws], [], torch.full((NUM_ANSWERS,), LENGTH), numbers, 8.0, list(range(NUM_ANSWERS))
    )


def main():
    model = make_model(d_model=128, n_heads=4, n_kv_heads=4, n_layers=6, mlp_hidden_size=384).train()
    peaks = {}
    for stage in ("dpo", "kto"):
        peaks[stage] = {}
        for num_draws in (8, 1, 8):  # the first is to warm up
            model.zero_grad(set_to_none=False)
            step, batch = make_step(stage, num_draws), make_batch(num_draws)
            before = resident_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            parts = step(model, batch, 8.0).parts
            assert len(parts) == num_draws
            for part in parts:
                part().backward()
            peaks[stage][num_draws] = peak_resident() - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
