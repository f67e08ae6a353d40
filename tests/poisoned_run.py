"""A small run of `fit` on several ranks, with a fault of one of them: what test_faults.py starts.

Usage: poisoned_run.py OUTPUT FAULT, FAULT = nan_stop, nan_skip, or what rank 1 does in step 3: kill (it
dies), stop (it answers no more), elsewhere (it sums what the other does not), forward (one more, sharded).
"""

import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed.distributed_c10d as c10d

import llada.run
from llada.diffusion.losses import masked_diffusion_loss
from llada.run import end_run, start_run, sum_over_ranks
from llada.training.loop import fit, prepare_trainable
from test_training import NoTokenizer, make_config, make_stream, tiny_model


def main(argv):
    output, fault = argv
    llada.run.BEAT_SECONDS = 0.2
    run = start_run("cpu")
    config = make_config(
        output, num_workers=0, micro_batch_size=2, on_nonfinite="skip" if fault == "nan_skip" else "stop"
    )
    config.shard = "full" if fault == "forward" else "none"
    stream = make_stream(config, run)
    model = prepare_trainable(tiny_model(), config)

    def faulty(step):
        batches = stream(step)
        if step == 3:  # limits are short from here on: a loaded machine is slow to get here
            llada.run.SILENT_SECONDS = 2.0
        if step == 3 and run.rank == 1:
            llada.run._peers.wait_for_news()  # so that this step is the last that the other hears of
            if fault in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            if fault == "elsewhere":
                llada.run.at("a sum of its own")
                sum_over_ranks([1.0])
            if fault == "forward":
                for group in list(c10d._world.pg_map):
                    c10d._set_pg_timeout(timedelta(seconds=2), group)
                masked_diffusion_loss(model, batches[0], 1.0)
            weights = torch.full_like(batches[1].weights, float("nan"))
            batches[1] = replace(batches[1], weights=weights)
            print(f"poisoned {sorted(batches[1].record_ids)}", flush=True)
        return batches

    fit(
        model, NoTokenizer(), config, run, stream=faulty, loss=masked_diffusion_loss, validate=None, data="",
    )  # fmt: skip
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    print(f"rank {run.rank} ends with {weights.double().sum().item():.12f}", flush=True)
    end_run()


if __name__ == "__main__":
    main(sys.argv[1:])
