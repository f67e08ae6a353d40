"""Group-relative policy optimisation (GRPO) of a masked diffusion language model.

Every step samples --num_generations completions to each of a few prompts from the model as it is, scores them
with --reward_funcs, and raises the likelihood of those that beat their group. What "likelihood" means is
--likelihood:

    elbo        the any-order bound of the whole completion, shared masks, one ratio a completion (default)
    trajectory  the exact likelihood of the sampler's own steps, low confidence or random order
    diffu       every token predicted from a fully masked answer: diffu-GRPO, the cheap baseline

Run:
    data=runs/quickstart/data
    python rlhf/train_grpo.py --model_name_or_path runs/quickstart/sft --reward_funcs reasoning_gym \\
        --train_data_path $data/prompts.jsonl --eval_data_path $data/heldout.jsonl \\
        --output_dir runs/quickstart/grpo --gen_length 32 --eos filled --batch_size 256 \\
        --num_generations 16 --learning_rate 1e-4 --max_steps 20 --eval_interval 10

    # LoRA on 8 GPUs, GSM8K, blocks of 32
    torchrun --nproc_per_node 8 rlhf/train_grpo.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \\
        --train_data_path openai/gsm8k@main --reward_funcs math format --reward_weights 1.0 0.2 --use_lora \\
        --output_dir runs/grpo --gen_length 256 --block_length 32 --batch_size 128 --micro_batch_size 4 \\
        --learning_rate 3e-6 --max_grad_norm 0.2

The same command continues an interrupted run. How to choose likelihood, advantages, rewards: docs/grpo.md.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llada.data.flags import QuestionFlags, SpellingFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.recipes import RecipeFlags
from llada.inference.sampler_flags import SamplerFlags, sampler_settings
from llada.policies.grpo_config import GrpoConfig
from llada.rewards.flags import RewardFlags
from llada.training.config import finished_before


@dataclass(kw_only=True)
class Config(QuestionFlags, SpellingFlags, RecipeFlags, GrpoConfig, RewardFlags, SamplerFlags):
    """GRPO."""

    stage = "rlhf/train_grpo.py"

    train_data_path: str = flag(
        "openai/gsm8k@main", "File of prompts, or name@config of a hub data set.", reads="data"
    )
    eval_data_path: str | None = flag(
        None, "Prompts for held-out accuracy: the first reward, at temperature 0.", reads="path"
    )
    apply_chat_template: bool = flag(True, "Prompts that are plain texts become a user's turn.", fixed=True)
    long_prompts: str = flag(
        "error", "Prompts beyond --max_length less the answer.", choices=["error", "drop"]
    )
    batch_size: int | None = flag(None, "Completions per optimizer step, over all ranks; default 128.")
    temperature: float = flag(1.0, "Of the sampler in training.")
    save_best: bool = flag(True, "Keep the weights with the best held-out accuracy in best/.")
    stop_accuracy: float | None = flag(
        None, "Stop at this held-out accuracy.", above=0, at_most=1, needs="eval_data_path"
    )
    patience: int = flag(
        0,
        "Stop after so many validations without a better accuracy; 0 = never.",
        at_least=0,
        needs="eval_data_path",
    )

    def agreed(self) -> dict[str, Any]:
        """With the sampler's settings, which decide a rollout, but those that change no token."""
        names = {field.name for field in fields(SamplerFlags)} - {"cuda_graphs", "early_stop"}
        return super().agreed() | {name: getattr(self, name) for name in sorted(names)}

    def settle(self, run: "Run") -> None:
        super().settle(run)
        settings = sampler_settings(self)
        self.check_likelihood(settings)
        if self.likelihood == "trajectory":
            check_settings(settings, order=self.order_term)

    def resolve(self, run: "Run", num_records: int) -> None:
        """`num_records` completions are an epoch; --num_iterations steps learn from each."""
        self._resolve_batch(run.world_size)
        if self.max_steps < 0:
            rollouts = max(1, round(self.num_train_epochs * num_records / self.batch_size))
            self.max_steps = rollouts * self.num_iterations
        super().resolve(run, num_records)
        unit = self.num_generations * run.world_size
        if self.batch_size % unit:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --num_generations "
                f"{self.num_generations} x {run.world_size} ranks = {unit}"
            )


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import torch
from transformers import PreTrainedTokenizerBase

from llada.data.prompts import Prompt, prompt_file, read_prompts
from llada.data.reading import describe_losses
from llada.diffusion.sampler_likelihood import check_settings
from llada.models.checkpoints import load_config
from llada.policies.completions import Sampler
from llada.policies.grpo import grpo_loss
from llada.policies.reference_model import make_reference
from llada.policies.rollouts import RolloutStream, sums_of_known
from llada.policies.stage import PolicyStage
from llada.policies.term_builder import TermBuilder
from llada.rewards.scoring import Reward
from llada.run import Run, autocast, described_run, means_over_ranks
from llada.training.dry_run import DataSize
from llada.training.monitor import EarlyStop
from modelling_final import LLaDAGenerationConfig


def prompts_in(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None
) -> tuple[list[Prompt], Counter]:
    """The prompts of a file that leave room for an answer, and how many did not."""
    context = load_config(config.sft_adapter_path or config.model_name_or_path).max_sequence_length
    found = read_prompts(
        path,
        tokenizer,
        chat=config.apply_chat_template,
        context=min(config.max_length, context),
        gen_length=config.gen_length,
        long=config.long_prompts,
        reader=config.reader(),
        parse_special=config.parse_special_tokens,
        limit=limit,
    )
    config.check_records(found[0])
    return found


def completion_rows(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> DataSize:
    """What a dry run needs to know of a file; a row is a completion."""
    with TemporaryDirectory() as folder:
        path = prompt_file(path, Path(folder), described_run("cpu"))
        prompts, _ = prompts_in(config, path, tokenizer, limit=config.max_samples)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    answers = len(prompts) * config.gen_length
    return DataSize(len(prompts), tokens + answers, answers, is_exact=True).times(config.num_generations)


def make_validation(
    sampler: Sampler, prompts: list[Prompt], config: Config, run: Run
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Held-out accuracy: the mean of the first reward, answered at temperature 0."""
    mine = prompts[run.rank :: run.world_size]
    greedy = replace(
        sampler,
        keep_trace=False,
        keep_canvas=False,
        settings=sampler.settings.changed(temperature=0.0, num_return_sequences=1),
    )

    def validate(_: torch.nn.Module) -> dict[str, float]:
        with autocast(run.device, config.dtype):
            completions = greedy.answer(mine, seed=config.seed, num_generations=1)
        columns = {"eval_reward": [c.reward for c in completions]}
        for reward in sampler.rewards:
            columns[f"eval_rewards/{reward.name}/mean"] = [c.rewards[reward.name] for c in completions]
        found = dict.fromkeys(columns, 0.0) | means_over_ranks(sums_of_known(columns))
        accuracy = found[f"eval_rewards/{sampler.rewards[0].name}/mean"]
        # what accuracy lacks to 1, so that the best checkpoint has the smallest
        return {"eval_loss": 1.0 - accuracy, "eval_accuracy": accuracy, **found}

    return validate


def make_stream(
    config: Config, stage: PolicyStage, prompts: list[Prompt], rewards: list[Reward]
) -> RolloutStream:
    """The stream of rollouts, with the sampler that makes them."""
    if config.method is None:  # a model that attends by blocks answers in the same ones
        usual = LLaDAGenerationConfig.from_model_config(stage.model.config).block_length
        if usual and usual < config.gen_length:
            config.block_length = config.block_length or usual
    settings = sampler_settings(config)
    stage.model.config.eot_token_id = stage.ids.eot
    return RolloutStream(
        sampler=Sampler(
            model=stage.model,
            tokenizer=stage.tokenizer,
            rewards=rewards,
            settings=settings,
            batch_size=config.rollout_batch_size,
            chat=config.apply_chat_template,
            keep_trace=config.likelihood == "trajectory",
            keep_canvas=config.eos == "canvas",
        ),
        prompts=prompts,
        terms_of=TermBuilder(config, settings, stage.ids),
        config=config,
        run=stage.run,
        reference=make_reference(config, stage.run) if config.beta and config.kl_to == "reference" else None,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs GRPO with the given flags."""
    config = parse(Config, argv, description=__doc__)
    held_out = [] if config.eval_data_path is None else [config.eval_data_path]
    stage = PolicyStage.start(
        config, partial(completion_rows, config), train=[config.train_data_path], held_out=held_out
    )
    if stage is None:
        return
    rewards = config.load_rewards()
    path = prompt_file(config.train_data_path, Path(config.output_dir, "data"), stage.run)
    prompts, counts = prompts_in(config, path, stage.tokenizer, limit=config.max_samples)
    if stage.run.is_main:
        print(f"{len(prompts)} prompts{describe_losses(counts, len(prompts) + counts.total())}", flush=True)
    stage.load(len(prompts) * config.num_generations)
    stream = make_stream(config, stage, prompts, rewards)
    validate = None
    for path in held_out:
        questions, _ = prompts_in(config, path, stage.tokenizer, limit=config.eval_limit)
        validate = make_validation(stream.sampler, questions, config, stage.run)
    target = None if config.stop_accuracy is None else 1.0 - config.stop_accuracy
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    stage.train(
        stream,
        partial(grpo_loss, flags=config),
        validate=validate,
        data=f"{len(prompts)} prompts, {num_tokens} tokens",
        early_stop=EarlyStop(target, config.patience),
    )


if __name__ == "__main__":
    run_main(main)
