"""Train a small autoregressive model on conversations: a teacher and verifier of the student's own size.

A transformers Llama of a size in configs/models, from scratch, or any causal checkpoint, continued. The loss
is the cross-entropy of the answers' tokens, each from those before it, averaged over an answer. Meant for
trials and for the quickstart; a real teacher is a checkpoint that you have already.

Run:
    python alignment/train_teacher.py --config_name 1m --tokenizer_name runs/sft \\
        --train_data_path sft.jsonl --eval_data_path sft_validation.jsonl --output_dir runs/teacher \\
        --max_length 128 --max_steps 1000

The same command continues an interrupted run.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from llada.data.flags import ConversationFlags, SpellingFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.training.config import PrefetchFlags, TrainConfig, finished_before


@dataclass(kw_only=True)
class Config(ConversationFlags, SpellingFlags, PrefetchFlags, TrainConfig):
    """Teacher training."""

    train_data_path: str = flag(help="Conversations: raw, or made by prepare_sft.py.", reads="path")
    eval_data_path: str | None = flag(None, "The same for validation.", reads="path")
    tokenizer_name: str = flag(help="Tokenizer folder; the student's, for a shared vocabulary.")
    config_name: str | None = flag(None, "From scratch: a size in configs/models.", reads="size")
    model_name_or_path: str | None = flag(None, "Causal checkpoint to continue.", reads="model")

    def check_flags(self) -> None:
        """What the run starts from."""
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("give either --config_name (from scratch) or --model_name_or_path (continue)")


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from llada.autoregressive.causal_lm import named_refusal, read_causal_config, read_causal_model
from llada.data.rows import ConversationRows
from llada.diffusion.batches import Example, MaskedBatch, Noised
from llada.diffusion.stream import MaskedStream
from llada.models.building import new_config
from llada.models.causal_layout import causal_config
from llada.models.checkpoints import is_meta, resolve_checkpoint
from llada.models.tokens import SpecialIds
from llada.training.rows_stage import train_on_rows


class CausalStream(MaskedStream):
    """Every answer token is asked for, once and always: there is no noise in causal training."""

    def hide(self, example: Example, record_id: int, *_: object, **__: object) -> Noised:
        return Noised(example, example.maskable, example.weight, record_id)


def example_of(rows: Dataset, record_id: int, _: int, __: int) -> Example:
    """One conversation; its answer tokens weigh 1 / their number."""
    row = rows[record_id]
    in_answer = row["in_answer"].astype(bool)
    return Example(row["input_ids"], in_answer, weight=1.0 / in_answer.sum(), num_units=1.0)


def causal_loss(model: torch.nn.Module, batch: MaskedBatch, total_units: float) -> torch.Tensor:
    """Mean over records of the mean nll of an answer's tokens given all before, in nats per answer token.

    L = sum_j weight_j * -log p(x_j | x_<j) / total_units,   weight_j = 1 / answer length
    """
    input_ids = batch.input_ids.flatten().index_copy(0, batch.rows, batch.targets).view_as(batch.input_ids)
    logits = model(input_ids=input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    before = logits.flatten(0, 1).index_select(0, batch.rows - 1)  # row j - 1 predicts token j
    nll = torch.nn.functional.cross_entropy(before.float(), batch.targets, reduction="none")
    return (nll * batch.weights).sum() / total_units


def new_teacher(
    config_name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, max_length: int
) -> LlamaForCausalLM:
    """A randomly initialised Llama with the shape of a named LLaDA size."""
    shape = new_config(config_name, tokenizer, max_length=max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(causal_config(shape, bos_token_id=tokenizer.bos_token_id))


def load_causal(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | str
) -> tuple[torch.nn.Module, SpecialIds]:
    """The model to train, new or from a checkpoint, in float32, and ids for its stream."""
    with torch.device(device) if is_meta(device) else nullcontext():
        if config.config_name is not None:
            model = new_teacher(config.config_name, tokenizer, seed=config.seed, max_length=config.max_length)
        else:
            path = resolve_checkpoint(config.model_name_or_path)
            with named_refusal("--model_name_or_path", path):
                shape = read_causal_config(path)
                if is_meta(device):
                    model = AutoModelForCausalLM.from_config(shape)
                else:
                    model = read_causal_model(path, dtype="float32")
    pad = tokenizer.pad_token_id  # no token is masked; an id is needed where a stream would put one
    return model.train(), SpecialIds(mask=pad, eos=tokenizer.eos_token_id, pad=pad, eot=None)


def main(argv: list[str] | None = None) -> None:
    """Trains the teacher with the given flags."""
    config = parse(Config, argv, description=__doc__)
    train_on_rows(
        config,
        ConversationRows(config.max_length, config.reader(), config.parse_special_tokens),
        lambda rows, *_: partial(example_of, rows),
        load=load_causal,
        stream_type=CausalStream,
        loss=causal_loss,
    )


if __name__ == "__main__":
    run_main(main)
