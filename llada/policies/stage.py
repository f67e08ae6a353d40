"""What every stage that trains a policy does around its loss: start, load, stream answers, train."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llada.diffusion.bound_gradient import disable_dropout
from llada.models.building import run_tokenizer
from llada.policies.answer_stream import AnswersOf, AnswerStream
from llada.policies.config import PolicyConfig
from llada.run import described_run
from llada.training import dry_run as preflight
from llada.training.loop import Loss, Stream, end_training, fit, load_with_ids, start_training


class PolicyStage:
    """A run of DPO, KTO or GRPO on this rank; `model` and its special `ids` are there after `load`."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.run = start_training(config)
        self.tokenizer = run_tokenizer(config, chat=True)

    @classmethod
    def start(
        cls,
        config: PolicyConfig,
        rows_of: preflight.DataSizeOf,
        *,
        train: Sequence[str],
        held_out: Sequence[str] | None,
    ) -> "PolicyStage | None":
        """The stage; None after a --dry_run, which has said what it found. `rows_of` reads a file for it."""
        run = described_run(config.device)  # a dry run of 64 ranks has no peers to meet
        config.settle(run)
        if not config.dry_run:
            return cls(config)
        preflight.report(config, rows_of, train=train, held_out=held_out, chat=True)
        return None

    def load(self, num_records: int) -> None:
        """Loads the policy, for so many records."""
        self.config.resolve(self.run, num_records)
        device = self.run.build_device
        self.model, self.ids = load_with_ids(self.config, self.tokenizer, device=device)
        disable_dropout(self.model)  # the two passes, and policy and reference, must see one network

    def answers(self, answers_of: AnswersOf, lengths: Iterable[int]) -> AnswerStream:
        """A stream over records of so many tokens each; see `AnswerStream`."""
        config = self.config
        return AnswerStream(
            answers_of,
            np.array(list(lengths)),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            num_draws=config.num_masks,
            seed=config.seed,
            run=self.run,
            mask_id=self.ids.mask,
            pad_id=self.ids.pad,
            fill=(self.ids.eos, config.max_length) if config.eos == "padded" else None,
            block_size=config.block_size,
        )

    def train(self, stream: Stream, loss: Loss, *, data: str, **options: Any) -> None:
        """The loop, and the end of the run; `options` are those of `fit`."""
        common = (self.model, self.tokenizer, self.config, self.run)
        fit(*common, stream=stream, loss=loss, data=data, **options)
        end_training()
