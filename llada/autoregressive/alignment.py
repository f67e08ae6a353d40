"""What alignment is trained on, and its loss: rows of a teacher, and how far the student is from them."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.teacher_rows import KIND
from llada.autoregressive.teacher_stream import AlignedBatch
from llada.data.prepared import load
from llada.data.rows import ConversationRows
from llada.data.shards import describe_tokenizer, is_prepared, load_rows, read_manifest
from llada.diffusion.distillation_losses import RowObjective, RowScore, accepted_length
from llada.diffusion.losses import LossParts
from llada.run import Run, Sums
from modelling_final import LLaDAConfig

log = logging.getLogger(__name__)


def has_teacher(path: str) -> bool:
    """Whether precompute_teacher.py made this folder; ValueError for one with its two splits inside."""
    if not is_prepared(path) and is_prepared(Path(path, "train")):
        raise ValueError(f"{path} holds prepared splits; name one, for example {Path(path, 'train')}")
    return is_prepared(path) and read_manifest(path)["fingerprint"]["kind"] == KIND


def check_rows(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """ValueError for teacher rows of another tokenizer, or longer than --max_length."""
    found, own = read_manifest(path)["fingerprint"], describe_tokenizer(tokenizer, with_template=False)
    if found["tokenizer"] != own:
        raise ValueError(
            f"{path} was made for tokenizer {found['tokenizer']}, this model's is {own}: run "
            "precompute_teacher.py again with --tokenizer set to this model"
        )
    if found["max_length"] > max_length:
        raise ValueError(
            f"{path} has rows of up to {found['max_length']} tokens, --max_length is {max_length}"
        )


def load_aligned(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, run: Run, *, prepared: Path
) -> Dataset:
    """Rows with a teacher, or conversations without; ValueError if they do not fit this model."""
    if not has_teacher(path):
        kind, run_folder = ConversationRows(max_length), prepared.parents[1]
        return load([path], kind, tokenizer, prepared=prepared, run=run, run_folder=run_folder)
    check_rows(path, tokenizer, max_length)
    return load_rows(path)


@dataclass(frozen=True)
class Alignment:
    """The loss, and the numbers that go with it.

    Attributes:
        forbidden_ids: the mask, and columns of the head that no token has.
        window_length: G, of the windows that acceptance is measured on; 0 for other rules.
        has_whole_windows: tau needs all places of a window.
    """

    objective: RowObjective
    forbidden_ids: torch.Tensor
    uses_streaks: bool
    window_length: int
    has_whole_windows: bool = True

    def score(self, batch: AlignedBatch, total_units: float) -> RowScore:
        """The losses of a micro-batch's rows, divided by the global number of units."""
        return RowScore(
            self.objective,
            targets=batch.targets,
            weights=batch.weights / total_units,
            teacher=batch.teacher,
            has_teacher=batch.has_teacher,
            teacher_weights=batch.teacher_weights / total_units,
            starts_window=batch.places == 1,
            forbidden_ids=self.forbidden_ids.to(batch.rows.device),
            uses_streaks=self.uses_streaks,
        )

    def loss(self, model: torch.nn.Module, batch: AlignedBatch, total_units: float) -> LossParts:
        """A micro-batch's share of the loss, with acceptance and tau to be logged."""
        score = self.score(batch, total_units)
        # FSDP copies dataclasses among a forward's arguments, and what the copy notes would be lost
        loss = model(**batch.inputs, score=score.__call__).loss
        sums = self.sums(batch, score)
        if log.isEnabledFor(logging.DEBUG):  # float(loss) waits for the GPU
            log.debug("records %s: loss %.4g, %s", batch.record_ids, loss.item(), sums)
        return LossParts(loss.detach(), [lambda: loss], sums)

    def sums(self, batch: AlignedBatch, score: RowScore) -> Sums:
        """name -> (sum, number): acceptance by place; with windows also tau, sampled and greedy."""
        found = {}
        if batch.num_visited is not None:
            found["judged"] = (batch.num_units, float(batch.num_visited))
        # all ranks must name the same sums, also one whose windows are all short
        for k in range(1, (self.window_length or 1) + 1):
            here = batch.has_teacher & (batch.places == k) if self.window_length else batch.has_teacher
            name = f"acceptance/{k}" if self.window_length else "acceptance"
            found[name] = (float(score.alpha[here].sum()), float(here.sum()))
        if self.window_length and self.has_whole_windows:
            starts = batch.places == 1
            for name, values in (("tau", score.alpha), ("tau_greedy", score.matches.float())):
                lengths = accepted_length(values, starts)
                found[name] = (float(lengths.sum()), float(len(lengths) if batch.has_teacher.any() else 0))
        return found


def refuse_sharing(model: LLaDAConfig) -> None:
    """ValueError for a model whose windows cannot share a text: it would look into what comes after them."""
    if (model.attention_pattern, model.attention_block_size, model.logit_shift) != ("block_causal", 1, True):
        raise ValueError(
            f"--keep_rate: attention_pattern {model.attention_pattern} sees the text behind a window; it is "
            "for causal drafters (scripts/convert_ar.py --drafter causal)"
        )
