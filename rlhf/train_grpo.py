"""Group-relative policy optimisation (GRPO) of a masked diffusion language model.

Every step samples --num_generations completions to each of a few prompts from the model as it is, scores them
with --reward_funcs, and raises the likelihood of those that beat their group. What "likelihood" means is
--estimator:

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

The same command continues an interrupted run. Records: a prompt, and the fields that the rewards need
(data/README.md). Writes beside the usual files completions.jsonl, and best/ by held-out accuracy. How to
choose estimator, advantages and rewards: docs/grpo.md.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llada.data.prompts import Prompt, prompt_file, read_prompts
from llada.diffusion.bound_estimator import SIZE_LAWS
from llada.diffusion.bound_gradient import adapter_off, disable_dropout
from llada.diffusion.sampler_likelihood import check_settings
from llada.flags import flag, parse
from llada.inference.sampler_flags import SamplerFlags, sampler_settings
from llada.models import has_fresh_adapter, load_tokenizer, special_ids
from llada.policies.config import OlderFlags, PolicyConfig
from llada.policies.grpo import BASELINES, LOSS_TYPES, SCALES, Objective, grpo_loss
from llada.policies.likelihood_terms import ESTIMATORS, TermBuilder
from llada.policies.reference_model import load_frozen
from llada.policies.rollouts import ReferenceModel, RolloutFiles, RolloutStream, Sampler
from llada.rewards.flags import RewardFlags
from llada.run import Run, end_run, start_run, sum_over_ranks
from llada.training.loop import fit, load_trainable
from llada.training.monitor import EarlyStop

# Beside the flags of every stage: what decides a rollout, its advantages, or its loss.
RESUME_MUST_AGREE = (
    "estimator", "num_generations", "num_iterations", "n_mc_samples", "mask_plan", "l_sampling",
    "eos", "trajectory_steps", "order_term", "p_mask_prompt", "beta", "epsilon", "epsilon_high",
    "loss_type", "scale_rewards", "advantages", "negative_weight", "reward_funcs", "reward_weights",
    "gen_length", "block_length", "steps", "temperature", "remasking", "method", "apply_chat_template",
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RewardFlags, SamplerFlags, OlderFlags, PolicyConfig):
    """Flags of GRPO."""

    train_data_path: str = flag(
        "openai/gsm8k@main", help="File of prompts, or name@config of a hub data set.", aliases=["dataset"]
    )
    eval_data_path: str | None = flag(
        None,
        help="Prompts for held-out accuracy: the first reward, at temperature 0.",
        aliases=["eval_dataset"],
    )
    apply_chat_template: bool = flag(
        True, help="Prompts that are plain texts become a user's turn.", aliases=["is_instruct"]
    )
    long_prompts: str = flag(
        "error", help="Prompts beyond --max_length less the answer.", choices=["error", "drop"]
    )
    input_key: str | None = flag(None, help="Field of the prompt, where it is not found by itself.")
    resume_from_checkpoint: str = flag(
        "auto",
        help="auto = continue --output_dir if it holds a state; none; or a folder.",
        aliases=["load_ckpt"],
    )
    batch_size: int = flag(
        128,
        help="Completions per optimizer step, over all ranks.",
        aliases=["train_batch_size", "train_batch"],
    )
    gradient_accumulation_steps: int | None = flag(
        None, help="Accepted; it follows from --batch_size, --micro_batch_size and the ranks."
    )
    num_generations: int = flag(
        8, help="Completions per prompt (G).", aliases=["group_size", "num_samples_per_prompt"]
    )
    rollout_batch_size: int = flag(256, help="Sequences sampled together on a device.")
    num_iterations: int = flag(1, help="Steps that learn from the same completions (mu).")
    estimator: str = flag("elbo", help="The likelihood that is raised.", choices=ESTIMATORS)
    n_mc_samples: int = flag(2, help="elbo: masks per completion (K).", aliases=["n_mc", "num_mc"])
    mask_plan: str = flag(
        "stratified",
        help="elbo: mask sizes spread evenly, drawn independently, or complementary pairs (ESPO).",
        choices=["stratified", "iid", "complementary"],
    )
    l_sampling: str = flag(
        "inv_sqrt", help="elbo: law of the mask sizes; inv_sqrt has less noise.", choices=SIZE_LAWS
    )
    eos: str = flag(
        "one",
        help="elbo, diffu: what ends an answer: the end token that was sampled; or that, and EOS that count "
        "up to the end of the canvas, for models trained with --eos_padding.",
        choices=["one", "filled"],
    )
    trajectory_steps: int = flag(
        0, help="trajectory: score so many random steps of a completion, weighted up; 0 = all."
    )
    order_term: bool = flag(True, help="trajectory: count which positions were decided, not only the tokens.")
    p_mask_prompt: float = flag(0.15, help="diffu: share of the prompt that is masked.")
    temperature: float = flag(1.0, help="Of the sampler in training.")
    steps: int | None = flag(
        None, help="Denoising steps over the whole answer; default gen_length.", aliases=["gen_steps"]
    )
    remasking_threshold: float | None = flag(
        None, help="The same as --parallel_decoding threshold --threshold X."
    )
    beta: float = flag(0.0, help="Weight of the KL to the reference (k2); 0: no reference is loaded.")
    epsilon: float = flag(0.2, help="Ratios count up to 1 + epsilon, and down to 1 - epsilon.")
    epsilon_high: float | None = flag(None, help="The upper limit's own value; default epsilon.")
    loss_type: str = flag(
        "grpo",
        help="Mean over completions (grpo), over all terms of the global batch (dapo, bnpo), or sum over "
        "terms / --gen_length (dr_grpo).",
        choices=LOSS_TYPES,
    )
    scale_rewards: str = flag(
        "none",
        help="Divide advantages by the standard deviation of the group, of the batch, or not.",
        choices=[*SCALES, "true", "false"],
    )
    advantages: str = flag(
        "leave_one_out", help="What a reward is compared with in its group.", choices=BASELINES
    )
    negative_weight: float = flag(
        1.0,
        help="Factor of advantages below 0. elbo pushes a bad answer down under masks that never led to it, "
        "which can harm a good model: then give less; 0 learns from what beat its group alone.",
    )
    log_completions: bool = flag(True, help="Write every completion to completions.jsonl.")
    save_best: bool = flag(True, help="Keep the weights with the best held-out accuracy in best/.")
    stop_accuracy: float | None = flag(None, help="Stop at this held-out accuracy (0 to 1).")
    patience: int = flag(0, help="Stop after so many validations without a better accuracy; 0 = never.")

    def settle(self, run: Run) -> None:
        """Checks the numbers of this stage against each other, and turns older spellings into flags."""
        super().settle(run)
        if self.remasking_threshold is not None:
            self.parallel_decoding, self.threshold = "threshold", self.remasking_threshold
        self.scale_rewards = {"true": "group", "false": "none"}.get(self.scale_rewards, self.scale_rewards)
        if self.num_generations < 2:
            raise ValueError(f"--num_generations {self.num_generations}: a group needs at least 2")
        unit = self.num_generations * run.world_size
        if self.batch_size % unit:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --num_generations "
                f"{self.num_generations} x {run.world_size} ranks = {unit}"
            )
        if self.num_iterations < 1:
            raise ValueError(f"--num_iterations {self.num_iterations} must be at least 1")
        if self.negative_weight < 0:
            raise ValueError(f"--negative_weight {self.negative_weight} must be at least 0")
        for name in ("stop_accuracy", "patience"):
            if getattr(self, name) and self.eval_data_path is None:
                raise ValueError(f"--{name} needs --eval_data_path")


def make_reference(config: Config, run: Run) -> ReferenceModel | None:
    """Where the reference is found: the policy without its fresh adapters, or a model of its own."""
    if config.beta == 0:
        return None
    if config.ref_model_name_or_path is None and has_fresh_adapter(config):

        @contextmanager
        def without_adapter(policy: torch.nn.Module) -> Iterator[torch.nn.Module]:
            with adapter_off(policy):
                yield policy

        return without_adapter
    model = load_frozen(config).to(run.device)

    @contextmanager
    def frozen(_: torch.nn.Module) -> Iterator[torch.nn.Module]:
        yield model

    return frozen


def make_validation(
    sampler: Sampler, prompts: list[Prompt], config: Config, run: Run
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Held-out accuracy: the mean of the first reward, answered at temperature 0.

    `eval_loss` is what it lacks to 1, so that the best checkpoint is the one with the smallest.
    """
    mine = prompts[run.rank :: run.world_size]
    greedy = Sampler(
        model=sampler.model,
        tokenizer=sampler.tokenizer,
        rewards=sampler.rewards,
        settings=sampler.settings.changed(temperature=0.0, num_return_sequences=1),
        batch_size=sampler.batch_size,
        chat=sampler.chat,
    )

    def validate(_: torch.nn.Module) -> dict[str, float]:
        completions = greedy.answer(mine, range(len(mine)), seed=config.seed, num_generations=1)
        columns = {"eval_reward": [c.reward for c in completions]}
        for reward in sampler.rewards:
            columns[f"eval_rewards/{reward.name}/mean"] = [c.rewards[reward.name] for c in completions]
        known = [[value for value in column if value is not None] for column in columns.values()]
        totals = sum_over_ranks([*map(math.fsum, known), *map(len, known)])
        counts = totals[len(columns) :]
        found = {
            name: total / max(count, 1.0)
            for name, total, count in zip(columns, totals[: len(columns)], counts, strict=True)
        }
        accuracy = found[f"eval_rewards/{sampler.rewards[0].name}/mean"]
        return {"eval_loss": 1.0 - accuracy, "eval_accuracy": accuracy, **found}

    return validate


def main(argv: list[str] | None = None) -> None:
    """Runs GRPO with the given flags."""
    config = parse(Config, argv, description=__doc__)
    run = start_run(config.device, output_dir=config.output_dir)
    config.settle(run)
    settings = sampler_settings(config)
    if config.estimator == "trajectory":
        check_settings(settings)
    if config.shard != "none":
        settings = settings.changed(early_stop=False)  # every rank must take part in as many forwards
    rewards = config.load_rewards()
    tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, chat=True)
    model = load_trainable(config)
    disable_dropout(model)
    ids = special_ids(model.config, tokenizer)
    model.config.eot_token_id = ids.eot
    read = partial(
        read_prompts,
        tokenizer=tokenizer,
        chat=config.apply_chat_template,
        context=min(config.max_length, model.config.max_sequence_length),
        gen_length=config.gen_length,
        long=config.long_prompts,
        key=config.input_key,
    )
    path = prompt_file(config.train_data_path, Path(config.output_dir, "data"), run)
    prompts, counts = read(path, limit=config.max_samples)
    if run.is_main:
        print(f"{len(prompts)} prompts {dict(counts) or ''}", flush=True)
    num_groups = config.batch_size // config.num_generations
    if config.max_steps < 0:
        rollouts = max(1, round(config.num_train_epochs * len(prompts) / num_groups))
        config.max_steps = rollouts * config.num_iterations
    config.resolve(run, len(prompts))

    sampler = Sampler(
        model=model,
        tokenizer=tokenizer,
        rewards=rewards,
        settings=settings,
        batch_size=config.rollout_batch_size,
        chat=config.apply_chat_template,
        keep_trace=config.estimator == "trajectory",
    )
    objective = Objective(
        epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta, loss_type=config.loss_type
    )
    stream = RolloutStream(
        sampler=sampler,
        prompts=prompts,
        terms_of=TermBuilder(
            estimator=config.estimator,
            settings=settings,
            ids=ids,
            seed=config.seed,
            micro_batch_size=config.micro_batch_size,
            num_draws=config.n_mc_samples,
            mask_plan=config.mask_plan,
            size_law=config.l_sampling,
            num_steps=config.trajectory_steps,
            order_term=config.order_term,
            p_mask_prompt=config.p_mask_prompt,
            fills_canvas=config.eos == "filled",
        ),
        objective=objective,
        num_groups=num_groups,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        baseline=config.advantages,
        scale_rewards=config.scale_rewards,
        negative_weight=config.negative_weight,
        seed=config.seed,
        run=run,
        files=RolloutFiles(Path(config.output_dir), run),
        dtype=config.dtype,
        reference=make_reference(config, run),
        log_completions=config.log_completions,
    )
    validate = None
    if config.eval_data_path is not None:
        held_out, _ = read(config.eval_data_path, limit=config.eval_limit)
        validate = make_validation(sampler, held_out, config, run)
    fit(
        model,
        tokenizer,
        config,
        run,
        stream=stream,
        loss=partial(grpo_loss, objective=objective),
        validate=validate,
        fingerprint={
            "train_data_path": f"{len(prompts)} prompts, {sum(len(p.token_ids) for p in prompts)} tokens",
            **{name: getattr(config, name) for name in RESUME_MUST_AGREE},
        },
        prefetch=False,
        early_stop=EarlyStop(
            None if config.stop_accuracy is None else 1.0 - config.stop_accuracy, config.patience
        ),
    )
    end_run()


if __name__ == "__main__":
    main()
