"""Direct preference optimisation of a masked diffusion language model (DPO, as VRPO estimates it).

Each answer's log-likelihood is the any-order bound, estimated from --n_mc_samples masks that policy and
reference share; the average over masks is inside the sigmoid. Gradients take the memory of one mask, however
many there are.

Run:
    python rlhf/train_dpo.py --model_name_or_path runs/sft --train_data_path pairs.jsonl \\
        --output_dir runs/dpo --beta 0.2 --learning_rate 5e-7 --batch_size 64 \\
        --loss_type sigmoid sft --loss_weights 1.0 0.05

    # LoRA on 8 GPUs: the reference is the same model with its adapters switched off
    torchrun --nproc_per_node 8 rlhf/train_dpo.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \\
        --train_data_path pairs.jsonl --output_dir runs/dpo --use_lora --beta 0.2 --learning_rate 5e-5 \\
        --batch_size 64 --micro_batch_size 2

Records: prompt, chosen, rejected, as texts or messages (data/README.md). The same command continues an
interrupted run. How to choose the estimator and the loss: docs/preference_optimization.md.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llada.data.answers import EOS, Encoding, Tokens, load_pairs
from llada.data.chat import LONG
from llada.data.messages import PAIR_KEYS
from llada.diffusion.bound_estimator import SIZE_LAWS
from llada.diffusion.bound_gradient import (
    differentiate,
    disable_dropout,
    draw_values,
    gradient_parts,
    plan_draws,
)
from llada.diffusion.likelihood import Request
from llada.diffusion.preference_losses import DPO_LOSSES, dpo_losses
from llada.flags import flag, parse
from llada.models import load_tokenizer, special_ids
from llada.policies.answer_stream import AnswerBatch, Answers, AnswerStream
from llada.policies.config import PolicyConfig
from llada.policies.reference_model import Reference, make_reference, precompute_reference
from llada.run import Run, Sums, autocast, end_run, start_run, sum_over_ranks
from llada.training import dry_run as preflight
from llada.training.loop import Loss, LossParts, fit, load_trainable

# Beside the flags of every stage.
RESUME_MUST_AGREE = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "rpo_alpha", "ipo", "n_mc_samples", "estimator",
    "l_sampling", "eos", "precompute_ref_log_probs", "ref_model_name_or_path",
)  # fmt: skip


@dataclass(kw_only=True)
class Config(PolicyConfig):
    """Flags of DPO."""

    train_data_path: list[str] = flag(help="Files of preference pairs.", aliases=["dataset"])
    eval_data_path: list[str] | None = flag(
        None, help="Pairs for validation: loss, accuracy and margin.", aliases=["eval_dataset"]
    )
    prompt_key: str = flag("prompt", help="Field of the prompt.")
    chosen_key: str = flag("chosen", help="Field of the preferred answer.")
    rejected_key: str = flag("rejected", help="Field of the other answer.")
    eos: str = flag(
        "one",
        help="What ends an answer: its end-of-turn token and one EOS, these and EOS that count up to "
        "--max_length, nothing, or ELBO-KTO's attended EOS padding up to --max_length.",
        choices=EOS,
    )
    long: str = flag(
        "error",
        help="Answers beyond --max_length: stop, drop and count, or cut and count.",
        choices=LONG,
    )
    beta: float = flag(0.1, help="Strength of the tie to the reference.")
    loss_type: list[str] = flag(
        ["sigmoid"], help="Terms of the loss; sft is the chosen answer's own loss.", choices=DPO_LOSSES
    )
    loss_weights: list[float] | None = flag(None, help="Weight of each --loss_type; default 1.")
    label_smoothing: float = flag(0.0, help="sigmoid: probability that a preference is the wrong way round.")
    ipo: bool = flag(False, help="The same as --loss_type ipo.")
    rpo_alpha: float = flag(0.0, help="Adds the sft term with this weight.", aliases=["nll_loss_coef"])
    estimator: str = flag(
        "stratified",
        help="How masks are drawn: sizes spread evenly, independently (VRPO), or in complementary pairs.",
        choices=["stratified", "iid", "complementary"],
    )
    l_sampling: str = flag(
        "auto",
        help="Law of the mask sizes: uniform, or small ones more often (inv_sqrt), with less noise, which is "
        "the default of --estimator stratified.",
        choices=["auto", *SIZE_LAWS],
    )
    precompute_ref_log_probs: bool = flag(
        False, help="Score the data under the reference once, under masks that all epochs share, and drop it."
    )
    dataset_probs: float = flag(1.0, help="Accepted; several files are read one after the other.")

    def settle(self, run: Run) -> None:
        super().settle(run)
        if self.l_sampling == "auto":
            self.l_sampling = "inv_sqrt" if self.estimator == "stratified" else "uniform"

    def terms(self) -> tuple[list[str], list[float]]:
        """Losses and weights, older spellings included."""
        names = ["ipo" if self.ipo and name == "sigmoid" else name for name in self.loss_type]
        weights = list(self.loss_weights or [1.0] * len(names))
        if self.rpo_alpha:
            names, weights = [*names, "sft"], [*weights, self.rpo_alpha]
        return names, weights


def answers_of(
    pairs: list[tuple[Tokens, Tokens]],
    reference: np.ndarray | None,
    config: Config,
    purpose: str,
    record_id: int,
    epoch: int,
    _: int,
) -> Answers:
    """Both answers of a pair, each under masks of its own."""
    requests = [
        Request(tokens.context, tokens.answer, f"{record_id} {side}")
        for tokens, side in zip(pairs[record_id], ("chosen", "rejected"), strict=True)
    ]
    epoch = 0 if config.precompute_ref_log_probs else epoch
    plans = plan_draws(
        requests,
        config.n_mc_samples,
        config.seed,
        purpose,
        epoch,
        estimator=config.estimator,
        size_law=config.l_sampling,
    )
    numbers = {} if reference is None else {"reference": reference[record_id].tolist()}
    return Answers(requests, plans, numbers)


def pair_losses(
    config: Config, reference: Reference | None, model: torch.nn.Module, batch: AnswerBatch
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """([P] losses, the leaf [P, 2] of log-likelihoods that they were computed from, sums to log)."""
    drawn = draw_values(model, batch.chunks)
    policy = drawn.sum(0).view(-1, 2).requires_grad_()
    known = batch.numbers.get("reference")
    values = known if known is not None else reference(model, batch.chunks).sum(0)
    loss_types, loss_weights = config.terms()
    losses = dpo_losses(
        policy,
        values.view(-1, 2),
        batch.lengths.view(-1, 2),
        beta=config.beta,
        loss_types=loss_types,
        loss_weights=loss_weights,
        label_smoothing=config.label_smoothing,
    )
    rewards = config.beta * (policy.detach() - values.view(-1, 2))
    spread = drawn.std(0) * len(drawn) ** 0.5 if len(drawn) > 1 else torch.zeros(drawn.shape[1])
    per_pair = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double(),
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "logps/chosen": policy[:, 0].detach(),
        "logps/rejected": policy[:, 1].detach(),
        "elbo/std": spread.view(-1, 2).mean(1),
    }
    return losses, policy, {name: (float(value.sum()), len(value)) for name, value in per_pair.items()}


def make_loss(config: Config, reference: Reference | None) -> Loss:
    """The loss of a step, in as many parts as it has forwards."""

    def loss(model: torch.nn.Module, batch: AnswerBatch, total_units: float) -> LossParts:
        losses, policy, sums = pair_losses(config, reference, model, batch)
        value = losses.sum() / total_units
        coefficients = differentiate(value, policy).flatten()
        return LossParts(value.detach(), gradient_parts(model, batch.chunks, coefficients), sums)

    return loss


@torch.no_grad()
def validate(
    config: Config, reference: Reference | None, stream: AnswerStream, run: Run, model: torch.nn.Module
) -> dict[str, float]:
    """Loss, accuracy and margins over the held-out pairs, under masks that never change."""
    sums: Counter = Counter()
    for batch, ids in stream.all_records(config.eval_limit):
        with autocast(run.device, config.dtype):
            losses, _, found = pair_losses(config, reference, model, batch.to(run.device))
        if ids:
            sums.update({name: total for name, (total, _) in found.items()})
            sums.update({"loss": float(losses.sum()), "pairs": len(ids)})
    names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]
    count, *totals = sum_over_ranks([sums["pairs"], *(sums[name] for name in names)])
    return {f"eval_{name}": total / count for name, total in zip(names, totals, strict=True)}


def read_pairs(
    config: Config, tokenizer: PreTrainedTokenizerBase, paths: list[str], limit: int | None = None
) -> tuple[list[tuple[Tokens, Tokens]], Counter]:
    """The pairs of some files as tokens, and counts."""
    encoding = Encoding(tokenizer, config.eos, config.apply_chat_template, config.max_length, config.long)
    keys = {name: getattr(config, f"{name}_key") for name in PAIR_KEYS}
    return load_pairs(paths, encoding, keys=keys, max_samples=limit)


def pair_rows(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> preflight.Rows:
    """What the preflight needs to know of a file; a row is a pair."""
    pairs, _ = read_pairs(config, tokenizer, [path])
    answers = sum(len(tokens.answer) for pair in pairs for tokens in pair)
    return preflight.Rows(len(pairs), sum(len(t) for pair in pairs for t in pair), answers, is_exact=True)


def main(argv: list[str] | None = None) -> None:
    """Runs DPO with the given flags."""
    config = parse(Config, argv, description=__doc__)
    run = start_run(config.device, output_dir=config.output_dir)
    config.settle(run)
    if config.dry_run:
        preflight.report(
            config, partial(pair_rows, config), train=config.train_data_path,
            checkpoint=config.model_name_or_path, chat=True,
        )  # fmt: skip
        return
    tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, chat=True)
    model = load_trainable(config)
    disable_dropout(model)
    ids = special_ids(model.config, tokenizer)
    fill = (ids.eos, config.max_length) if config.eos == "padded" else None

    def stream_over(pairs: list[tuple[Tokens, Tokens]], purpose: str) -> AnswerStream:
        return AnswerStream(
            partial(answers_of, pairs, None, config, purpose),
            np.array([max(map(len, pair)) for pair in pairs]),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            num_draws=config.n_mc_samples,
            seed=config.seed,
            run=run,
            mask_id=ids.mask,
            pad_id=ids.pad,
            fill=fill,
        )

    pairs, counts = read_pairs(config, tokenizer, config.train_data_path, config.max_samples)
    if run.is_main:
        print(f"training pairs: {dict(counts)}", flush=True)
    config.resolve(run, len(pairs))
    streams = {"preference": (pairs, stream_over(pairs, "preference"))}
    if config.eval_data_path is not None:
        held_out, _ = read_pairs(config, tokenizer, config.eval_data_path)
        streams["validation"] = (held_out, stream_over(held_out, "validation"))

    if config.precompute_ref_log_probs:
        reference = None
        for purpose, (records, stream) in streams.items():
            values = precompute_reference(
                stream, config, run, model, Path(config.output_dir, f"reference_{purpose}.npz")
            )
            stream.answers_of = partial(answers_of, records, values, config, purpose)
    else:
        reference = make_reference(config, run)
    fit(
        model,
        tokenizer,
        config,
        run,
        stream=streams["preference"][1],
        loss=make_loss(config, reference),
        validate=partial(validate, config, reference, streams["validation"][1], run)
        if "validation" in streams
        else None,
        fingerprint={
            "train_data_path": f"{len(pairs)} pairs, {sum(len(t) for pair in pairs for t in pair)} tokens",
            **{name: getattr(config, name) for name in RESUME_MUST_AGREE},
        },
    )
    end_run()


if __name__ == "__main__":
    main()
