"""A small run of `fit` under torchrun, with a fault of one rank: what test_faults.py starts.

Usage: poisoned_run.py OUTPUT FAULT, FAULT = nan_stop, nan_skip, or kill (rank 1 dies in step 3).
"""

import os
import signal
import sys
from dataclasses import replace

import torch

from llada.diffusion.losses import masked_diffusion_loss
from llada.run import end_run, start_run
from llada.training.loop import fit, prepare_trainable
from test_training import NoTokenizer, make_config, make_stream, tiny_model

output, fault = sys.argv[1:]
run = start_run("cpu")
config = make_config(
    output, num_workers=0, micro_batch_size=2, on_nonfinite="skip" if fault == "nan_skip" else "stop"
)
stream = make_stream(config, run)


def faulty(step):
    batches = stream(step)
    if step == 3 and run.rank == 1:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        weights = torch.full_like(batches[1].weights, float("nan"))
        batches[1] = replace(batches[1], weights=weights)
        print(f"poisoned {sorted(batches[1].record_ids)}", flush=True)
    return batches


model = prepare_trainable(tiny_model(), config)
fit(
    model, NoTokenizer(), config, run, stream=faulty, loss=masked_diffusion_loss, validate=None,
    data="",
)  # fmt: skip
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"rank {run.rank} ends with {weights.double().sum().item():.12f}", flush=True)
end_run()
