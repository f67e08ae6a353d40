"""ELBO-KTO: learning from single answers that are labelled desirable or not (unpaired preferences).

The log-likelihood of an answer is the any-order bound, estimated from the same masks as the reference's,
which precompute_bref.py has written. r = B - B_ref, s = beta (r - z0), and the loss is
lambda_D (1 - sigma(s)) for a desirable answer, lambda_U (1 - sigma(-s)) for another. z0, the point that r is
compared with, is a mean over the whole batch (all ranks and micro-batches) without a gradient.

Run:
    python rlhf/precompute_bref.py --model_path runs/sft --dataset kto.jsonl --k_vals 8 \\
        --output_file bref.jsonl
    python rlhf/train_elbo_kto.py --model_name_or_path runs/sft --train_data_path bref.jsonl \\
        --output_dir runs/kto --batch_size 32 --beta 0.1 --learning_rate 1e-6

    torchrun --nproc_per_node=8 rlhf/train_elbo_kto.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \\
        --train_data_path data/kto-mix-14k-processed/train.jsonl --num_masks 8 --z0_mode global_mean \\
        --beta 0.1 --learning_rate 1e-6 --warmup_ratio 0.03 --output_dir models/elbo-kto-finetuned

The same command continues an interrupted run. More: docs/preference_optimization.md.
"""

from dataclasses import dataclass
from functools import partial

from llada.diffusion.settings import Z0_MODES
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.policies.config import PolicyConfig, ReferenceFlags
from llada.training.config import PrefetchFlags, finished_before


@dataclass(kw_only=True)
class Config(PrefetchFlags, ReferenceFlags, PolicyConfig):
    """ELBO-KTO."""

    default_batch_size = None  # --micro_batch_size x ranks

    output_dir: str = flag("kto-train", "Folder of the run.")
    train_data_path: str = flag(
        help="Records written by precompute_bref.py, ours or the published program's.", reads="path"
    )
    eval_data_path: str | None = flag(None, "Such records for validation.", reads="path")
    beta: float = flag(0.2, "Strength of the tie to the reference.", above=0, fixed=True)
    desirable_weight: float = flag(1.0, "Weight of desirable answers (lambda_D).", at_least=0, fixed=True)
    undesirable_weight: float = flag(1.0, "Weight of undesirable answers (lambda_U).", at_least=0, fixed=True)
    z0_mode: str = flag(
        "global_mean",
        "z0: nothing, the mean of r over the batch, that mean without the record itself, a moving average of "
        "it, or max(0, mean r of answers to other prompts), KTO's own, which needs the reference.",
        choices=Z0_MODES,
        fixed=True,
    )
    verify_masks: bool = flag(True, "Compare masks with the records' sums and hashes.")
    n_D: float = flag(1.0, "Share of the desirable records to use.", at_least=0, at_most=1, fixed=True)
    n_U: float = flag(1.0, "Share of the undesirable records to use.", at_least=0, at_most=1, fixed=True)
    sample_seed: int = flag(42, "Seed of that choice.", at_least=0, fixed=True)
    eos: str | None = flag(
        None,
        "As in precompute_bref.py; default what the records say.",
        choices=["one", "filled", "none", "padded"],
    )
    max_length: int | None = flag(None, "As in precompute_bref.py; default what the records say.")
    long: str = flag("truncate", "As in precompute_bref.py.", choices=["error", "drop", "truncate"])
    batch_size: int | None = flag(
        None,
        "Records per optimizer step, over all ranks; default --micro_batch_size (1) x "
        "--gradient_accumulation_steps (1) x ranks.",
    )
    learning_rate: float = 5e-6
    warmup_ratio: float = 0.03
    save_interval: int = 3000
    shard: str = "full"

    def settle(self, run: "Run") -> None:
        super().settle(run)
        if run.world_size == 1:
            self.shard = "none"  # full is the published program's default, and means several ranks

    def check_flags(self) -> None:
        """Shares of the records."""
        if self.n_D + self.n_U == 0:
            raise ValueError(f"--n_D {self.n_D} --n_U {self.n_U}: no record is left")

    def resolve(self, run: "Run", num_records: int) -> None:
        super().resolve(run, num_records)
        alone = {
            "global_mean": "z0 would be the record's own r, so s = 0 and the loss a constant",
            "loo_mean": "there is no other record to take z0 from",
            "kl_mismatched": "there is no other record to take an answer from",
        }
        if self.batch_size == 1 and self.z0_mode in alone:
            raise ValueError(
                f"--z0_mode {self.z0_mode} with a batch of one record: {alone[self.z0_mode]}. Use "
                "--batch_size 2 or more (--gradient_accumulation_steps counts), or --z0_mode ema or zero"
            )


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llada.diffusion.bound_gradient import (
    MaskedCopies,
    differentiate,
    draw_values,
    gradient_parts,
    plan_draws,
)
from llada.diffusion.likelihood import Request
from llada.diffusion.losses import LossParts
from llada.diffusion.preference_losses import kto_baseline, kto_losses
from llada.diffusion.settings import MaskSettings
from llada.policies.answer_stream import AnswerBatch, AnswerStream, RecordAnswers, sums_of
from llada.policies.kto_reference import (
    BrefFile,
    BrefRecord,
    BrefSettings,
    check_fingerprint,
    fingerprint,
    prefix_means,
    read_bref,
    subsample,
)
from llada.policies.reference_model import Reference, make_reference
from llada.policies.stage import PolicyStage
from llada.run import Run, Sums, autocast, means_over_ranks, sum_over_ranks
from llada.training.dry_run import DataSize


def read(path: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> BrefFile:
    """A file's records; fills in --eos and --max_length from the first one read."""
    file = read_bref(
        path,
        tokenizer,
        num_draws=config.num_masks,
        eos=config.eos,
        max_length=config.max_length,
        long=config.long,
        verify=config.verify_masks,
    )
    config.eos, config.max_length = file.eos, file.max_length
    return file


def check_made_with(file: BrefFile, config: Config, tokenizer: PreTrainedTokenizerBase, mask_id: int) -> None:
    """ValueError if B_ref is not that of the reference as training would compute it."""
    if file.block_size != config.block_size:
        sizes = (file.block_size, config.block_size)
        found, wanted = (f"blocks of {size}" if size else "whole answers" for size in sizes)
        raise ValueError(
            f"--objective {config.objective}: {file.records[0].where} has B_ref of {found}, not of {wanted}; "
            "make it with the --objective and --block_size of training"
        )
    # the published program's records do not say; only their masks are checked
    if file.fingerprint is None:
        return
    reference = config.ref_model_name_or_path or config.sft_adapter_path or config.model_name_or_path
    chat, weights_dtype = file.fingerprint["chat"], config.dtype if config.use_lora else "float32"
    settings = BrefSettings(
        config.max_length, mask_id, config.eos, chat, config.dtype, weights_dtype, config.block_size
    )
    check_fingerprint(file.fingerprint, fingerprint(reference, tokenizer, settings), file.records[0].where)


def answers_of(
    config: Config, records: list[BrefRecord], record_id: int, epoch: int, neighbour: int
) -> RecordAnswers:
    """An answer under the masks of its B_ref; for `kl_mismatched` also the neighbour's answer to it."""
    record = records[record_id]
    tokens, others = record.tokens, []
    if config.z0_mode == "kl_mismatched":
        answer = records[neighbour].tokens.answer[: config.max_length - len(tokens.context)]
        other = Request(tokens.context, answer, f"{record_id} {neighbour}")
        masks = MaskSettings(config.num_masks)
        others = [
            (other, *plan_draws([other], masks, config.seed, "kl", epoch, block_size=config.block_size))
        ]
    request = Request(tokens.context, tokens.answer, str(record_id))
    numbers = {"b_ref": [record.b_ref], "is_desirable": [float(record.is_desirable)]}
    return RecordAnswers([request], [record.plan], numbers, others)


def log_likelihoods(model: torch.nn.Module, chunks: list[MaskedCopies]) -> Tensor:
    """[N] B of answers whose plans leave the mean over draws to be taken here."""
    return torch.from_numpy(prefix_means(draw_values(model, chunks).numpy())[-1])


def step_sums(ratios: Tensor, z0: Tensor, policy: Tensor, batch: AnswerBatch, beta: float) -> Sums:
    """What to log: the published program's names, then TRL's."""
    desirable = batch.numbers["is_desirable"].bool()
    s = (beta * (ratios - z0)).abs()
    columns = {
        "abs_beta_r/mean": (beta * ratios).abs(),
        "abs_beta_s/mean": s,
        "abs_r_hat_z0/mean": (ratios - z0).abs(),
        "abs_beta_s/frac>6": (s > 6).double(),
        "abs_beta_s/frac>8": (s > 8).double(),
        "resp_len/mean": batch.lengths.double(),
        "kl": z0,
        "rewards/chosen": beta * ratios[desirable],
        "rewards/rejected": beta * ratios[~desirable],
        "logps/chosen": policy[desirable],
        "logps/rejected": policy[~desirable],
    }
    return sums_of(columns)


class KtoLoss:
    """The loss of a step and of validation; state: z0, for --z0_mode ema."""

    def __init__(self, config: Config, reference: Reference | None = None) -> None:
        self.config = config
        self.reference = reference  # scores answers to other prompts, for --z0_mode kl_mismatched
        self.z0: float | None = None  # of the step before

    def state_dict(self) -> dict[str, float | None]:
        return {"z0": self.z0}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.z0 = state["z0"]

    def _compared(self, model: torch.nn.Module, batch: AnswerBatch, ratios: Tensor) -> Tensor:
        """[N] what z0 is a mean of: r of the answers, or of answers to other prompts."""
        if self.reference is None:
            return ratios.detach()
        policy = draw_values(model, batch.others).sum(0)
        with self.reference(model) as frozen:
            return policy - draw_values(frozen, batch.others).sum(0)

    def _losses(self, ratios: Tensor, is_desirable: Tensor, z0: Tensor) -> Tensor:
        config = self.config
        weights = {"lambda_d": config.desirable_weight, "lambda_u": config.undesirable_weight}
        return kto_losses(ratios, is_desirable, z0, beta=config.beta, **weights)

    def step(self, model: torch.nn.Module, batch: AnswerBatch, total_units: float) -> LossParts:
        """The loss of a step, in as many parts as it has forwards."""
        config = self.config
        leaf = log_likelihoods(model, batch.chunks).requires_grad_()
        ratios = leaf - batch.numbers["b_ref"]
        compared = self._compared(model, batch, ratios)
        # over all ranks and micro-batches: in small batches z0 would follow the record itself
        total, count = sum_over_ranks([float(compared.sum()), len(compared)])
        z0 = kto_baseline(ratios, mode=config.z0_mode, total=total, count=count, previous=self.z0)
        if config.z0_mode == "ema":
            self.z0 = float(z0[0])
        value = self._losses(ratios, batch.numbers["is_desirable"].bool(), z0).sum() / total_units
        coefficients = differentiate(value, leaf) / config.num_masks  # B is a mean over draws here
        sums = step_sums(ratios.detach(), z0, leaf.detach(), batch, config.beta)
        return LossParts(value.detach(), gradient_parts(model, batch.chunks, coefficients), sums)

    @torch.no_grad()
    def validate(self, stream: AnswerStream, model: torch.nn.Module) -> dict[str, float]:
        """Loss, rewards and the rate at which desirable answers lie above z0 and others below, held out."""
        config = self.config
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch, ids in stream.all_records(config.eval_limit):
            batch = batch.to(stream.run.device)
            with autocast(stream.run.device, config.dtype):
                ratios = log_likelihoods(model, batch.chunks) - batch.numbers["b_ref"]
                found = (ratios, self._compared(model, batch, ratios), batch.numbers["is_desirable"])
            columns.append(tuple(values[: len(ids)] for values in found))
        r, compared, labels = (torch.cat(values) for values in zip(*columns, strict=True))
        is_desirable = labels.bool()
        # z0 is a mean over all held-out records (0 for --z0_mode zero), the same for every record
        total, count = sum_over_ranks([float(compared.sum()), len(compared)])
        mode = config.z0_mode if config.z0_mode in ("zero", "kl_mismatched") else "global_mean"
        z0 = kto_baseline(r, mode=mode, total=total, count=count, previous=None)
        rewards = config.beta * r
        parts = {
            "loss": self._losses(r, is_desirable, z0),
            "accuracies": ((r > z0) == is_desirable).double(),
            "rewards/chosen": rewards[is_desirable],
            "rewards/rejected": rewards[~is_desirable],
        }
        found = dict.fromkeys(parts, 0.0) | means_over_ranks(sums_of(parts))
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return {f"eval_{name}": value for name, value in found.items()}


def usable(file: BrefFile, config: Config) -> list[BrefRecord]:
    """The records that the flags choose."""
    return subsample(file.records, config.n_D, config.n_U, config.sample_seed)[: config.max_samples]


def record_rows(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> DataSize:
    """What a dry run needs to know of a file."""
    tokens = [record.tokens for record in usable(read(path, config, tokenizer), config)]
    answers = sum(len(found.answer) for found in tokens)
    return DataSize(len(tokens), sum(map(len, tokens)), answers, is_exact=True)


def main(argv: list[str] | None = None) -> None:
    """Runs ELBO-KTO with the given flags."""
    config = parse(Config, argv, description=__doc__)
    paths = [path for path in (config.train_data_path, config.eval_data_path) if path is not None]
    stage = PolicyStage.start(config, partial(record_rows, config), train=paths[:1], held_out=paths[1:])
    if stage is None:
        return
    files = [read(path, config, stage.tokenizer) for path in paths]
    records = usable(files[0], config)
    stage.load(len(records))
    for file in files:
        check_made_with(file, config, stage.tokenizer, stage.ids.mask)
    if stage.run.is_main:
        desirable = sum(record.is_desirable for record in records)
        undesirable = len(records) - desirable
        print(f"{len(files[0].records)} records, used: {desirable} desirable, {undesirable} undesirable",
              flush=True)  # fmt: skip
    needs_reference = config.z0_mode == "kl_mismatched"
    loss = KtoLoss(config, make_reference(config, stage.run) if needs_reference else None)
    training, *held_out = (
        stage.answers(partial(answers_of, config, part), [len(record.tokens) for record in part])
        for part in (records, *(file.records for file in files[1:]))
    )
    num_tokens = sum(len(record.tokens) for record in records)
    stage.train(
        training,
        loss.step,
        validate=partial(loss.validate, held_out[0]) if held_out else None,
        data=f"{len(records)} records, {num_tokens} tokens",
        kept=loss,
    )


if __name__ == "__main__":
    run_main(main)
