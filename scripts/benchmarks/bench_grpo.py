"""Times a GRPO step of a model of random weights, in one process: sampling, likelihoods, gradients, update.

Arms, in turns: `whole` and, with --sharded, `sharded`, the same model under FSDP2 on a group of one rank: its
hooks without what many ranks would exchange. Rewards are random numbers, so every group learns.

Run:
    python scripts/benchmarks/bench_grpo.py --config_name 1m --sharded
    python scripts/benchmarks/bench_grpo.py --config_name 1b --sharded --device cuda --dtype bfloat16
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    config_name: str = flag("1m", help="Size of the model, as for pretraining.", reads="size")
    vocab_size: int = flag(320, help="Its vocabulary.", at_least=8)
    sharded: bool = flag(False, help="Also under FSDP2.")
    prompt_length: int = flag(32, help="Tokens of a prompt.", at_least=1)
    gen_length: int = flag(32, help="Tokens of a completion.", at_least=1)
    block_length: int = flag(8, help="Tokens of a block.", at_least=1)
    num_prompts: int = flag(2, help="Prompts of a step, with eight completions each.", at_least=1)
    micro_batch_size: int = flag(8, help="Completions of a forward with gradients.", at_least=1)
    repeats: int = flag(3, help="Steps of each arm.", at_least=1)
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag("float32", help="Of the products.", choices=["float32", "bfloat16"])


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch
import torch.distributed as dist

from llada.data.prompts import Prompt
from llada.models.tokens import SpecialIds
from llada.policies.completions import Sampler
from llada.policies.grpo import grpo_loss
from llada.policies.grpo_config import GrpoConfig
from llada.policies.rollouts import RolloutStream
from llada.policies.term_builder import TermBuilder
from llada.rewards.scoring import Reward
from llada.run import Run
from llada.training.loop import make_optimizer
from llada.training.monitor import Progress
from llada.training.parallel import parallelize
from llada.training.step import Trainer
from modelling_final import LLaDAGenerationConfig
from sampler_shapes import Shape, random_model

NUM_GENERATIONS = 8


class NoTexts:
    """In place of a tokenizer: nobody reads the completions."""

    def decode(self, *_: object, **__: object) -> str:
        return ""


def random_rewards(prompts: list[object], completions: list[object], **_: object) -> list[float]:
    """A number from 0 to 1 for each completion."""
    return torch.rand(len(completions), generator=torch.Generator().manual_seed(0)).tolist()


def steps_of(config: Config, folder: str, *, is_sharded: bool) -> Callable[[int], None]:
    """step -> a whole step of GRPO, as rlhf/train_grpo.py makes it."""
    run = Run(rank=0, world_size=1, device=torch.device(config.device))
    batch_size = config.num_prompts * NUM_GENERATIONS
    flags = GrpoConfig(
        model_name_or_path="", output_dir=folder, num_generations=NUM_GENERATIONS,
        batch_size=batch_size, micro_batch_size=min(config.micro_batch_size, batch_size), dtype=config.dtype,
        shard="full" if is_sharded else "none", max_steps=1, learning_rate=1e-6, log_completions=False,
        max_length=config.prompt_length + config.gen_length,
    )  # fmt: skip
    model = random_model(
        Shape(config.config_name, config.vocab_size, (), "float32"), config.device, seed=0
    ).train()
    ids = SpecialIds(
        *(getattr(model.config, f"{name}_token_id") for name in ("mask", "eos", "pad")), eot=None
    )
    trained = parallelize(model, run, shard=flags.shard, dtype=flags.dtype)
    settings = LLaDAGenerationConfig(
        method="semi_autoregressive_padding", gen_length=config.gen_length, block_length=config.block_length,
        temperature=1.0,
    )  # fmt: skip
    tokens = torch.randint(ids.eos, (config.num_prompts, config.prompt_length)).tolist()
    rewards = [Reward("random", random_rewards)]
    stream = RolloutStream(
        sampler=Sampler(model, NoTexts(), rewards, settings, batch_size, chat=False),
        prompts=[Prompt(n, row, {}) for n, row in enumerate(tokens)],
        terms_of=TermBuilder(flags, settings, ids), config=flags, run=run,
    )  # fmt: skip
    trainer = Trainer(
        trained,
        make_optimizer(model, flags),
        flags,
        run,
        partial(grpo_loss, flags=flags),
        Progress(run.device, 1),
    )

    def step(number: int) -> None:
        batches = stream(number)
        trainer.step(0, batches, sum(batch.num_units for batch in batches))

    return step


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each step, and the medians."""
    config = parse(Config, argv, description=__doc__)
    on_gpu = config.device.startswith("cuda")
    if config.sharded:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    seconds: dict[str, list[float]] = {"whole": [], "sharded": []} if config.sharded else {"whole": []}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: steps_of(config, folder, is_sharded=name == "sharded") for name in seconds}
        for number in range(-1, config.repeats):  # the first warms up
            for name, step in steps.items():
                started = time.perf_counter()
                step(number + 1)
                if on_gpu:
                    torch.cuda.synchronize()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
                    print(f"{name} step {number + 1}: {seconds[name][-1]:.3f} s", flush=True)
    tokens = config.num_prompts * NUM_GENERATIONS * config.gen_length
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"GRPO {name}: {middle:.3f} s a step, {tokens / middle:.0f} sampled tokens/s", flush=True)
    if config.sharded:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
