"""Reference values for ELBO-KTO: the any-order bound of every answer under the reference model, for K masks.

Masks follow from each record's position alone, so training finds the same ones. Every K of --k_vals comes
from one pass, as prefixes of the same draws.

Run:
    python rlhf/precompute_bref.py --model_path GSAI-ML/LLaDA-8B-Instruct --dataset data/kto-mix-14k \\
        --k_vals 1,2,4,8 --output_file data/kto-mix-14k-processed/train.jsonl --num_gpus 8 --batch_size 8

    torchrun --nproc_per_node 8 rlhf/precompute_bref.py ...    # the same

Records: prompt, completion, label (or pairs), as texts or messages (data/README.md), written to --output_file
in their order with what training checks. The same command after a kill continues.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from llada.data.flags import AnswerFlags, LabelledFlags
from llada.flags.declaration import first_line
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.training.config import BlockFlags


@dataclass(kw_only=True)
class Config(BlockFlags, LabelledFlags, AnswerFlags):
    """The reference values."""

    model_name_or_path: str = flag(
        help="Checkpoint of the reference: folder, run, adapter, or hub name.", reads="model"
    )
    input: str = flag(
        help="JSONL, JSON or Parquet file, folder of files or of a data set, or name of one on the hub.",
        reads="data",
    )
    num_masks: list[int] = flag(help="Numbers of masks (K) to give B_ref for.", at_least=1)
    output_path: str = flag(help="JSONL file to write.", writes="file")
    batch_size: int = flag(1, "Answers per forward.", at_least=1)
    num_gpus: int | None = flag(
        None,
        "Processes to start, at most one a GPU (without GPUs, a CPU core); default all GPUs.",
        at_least=1,
    )
    max_samples: int | None = flag(None, "Only the first so many answers.", at_least=1)
    split: str = flag("train", "Split of a data set that has several.")
    mask_id: int | None = flag(None, "Mask token id; must be the model's.", at_least=0)
    mask_token: str | None = flag(None, "Mask token; must be the model's.")
    tokenizer_name: str | None = flag(None, "Tokenizer folder; default that of the model.", reads="model")
    max_length: int = flag(4096, "Longest prompt and answer in tokens.", at_least=1)
    long: str = flag("truncate", "Answers beyond --max_length: stop, leave empty, or cut.")
    dtype: str = flag(
        "auto",
        "Precision of the matrix products, as in training. auto: bfloat16 on a GPU.",
        choices=["auto", "float32", "bfloat16"],
    )
    weights_dtype: str = flag(
        "float32",
        "Precision that the weights are loaded in: as training does it, float32, or with LoRA --dtype.",
        choices=["float32", "bfloat16"],
    )
    device: str | None = flag(None, "cpu, cuda, ...; default the GPU if there is one.")

    def check_flags(self) -> None:
        """Ascending: the largest decides how many masks are drawn."""
        self.num_masks = sorted(set(self.num_masks))


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from tqdm import tqdm

from llada.data.answers import Encoded, Encoding, Tokens, encode_answers, labelled_answers
from llada.data.reading import BAD, Labelled, describe_losses
from llada.data.records import Located
from llada.diffusion.bound_gradient import draw_values, make_draws
from llada.diffusion.likelihood import Request
from llada.models.building import settle_blocks
from llada.models.checkpoints import load_model
from llada.models.tokens import SpecialIds, load_tokenizer, special_ids
from llada.policies.kto_reference import (
    BrefSettings,
    answer_blocks,
    base_seed,
    draw_masks,
    fingerprint,
    mask_checks,
    plan_of,
    prefix_means,
)
from llada.resumable import ResumableJob, write_atomically
from llada.run import autocast, barrier, end_run, start_processes, start_run


def source_of(config: Config) -> str | Iterable[Located]:
    """--input, or the located records of --split where it names a data set of the hub."""
    path = Path(config.input)
    if not path.exists():
        try:
            rows = load_dataset(config.input, split=config.split)
        except (OSError, ValueError, DatasetsError) as error:
            reason = first_line(error)
            raise ValueError(
                f"--input {config.input}: neither a file here nor given by the hub ({reason})"
            ) from error
        return ((f"{config.input}:{number}", row) for number, row in enumerate(rows, start=1))
    return config.input


def describe(index: int, item: Labelled, found: Encoded, config: Config) -> dict[str, Any]:
    """A record's fields besides B_ref."""
    lengths = [0] if found.tokens is None else answer_blocks(found.tokens, config.block_size)
    base = base_seed(index)
    masks = draw_masks(base, lengths, config.num_masks[-1])
    return {
        "index": index,
        "seed": str(base),  # a 64-bit number, which JSON readers in other languages would round
        "l_values": masks.sum(axis=1).tolist(),
        **mask_checks(masks, found.prompt_length),
        "prompt": item.prompt,
        "completion": item.completion,
        "label": item.label,
        "prompt_length": found.prompt_length,
        "completion_length": masks.shape[1],
        "text_length": found.text_length,
        "labels": int(item.label),
    }


def batches_of(tokens: list[Tokens | None], batch_size: int) -> list[list[int]]:
    """Indices of the records with an answer, those of similar length together, longest first."""
    usable = [index for index, found in enumerate(tokens) if found is not None]
    usable.sort(key=lambda index: (-len(tokens[index]), index))
    return [usable[start : start + batch_size] for start in range(0, len(usable), batch_size)]


def bounds_of(
    model: torch.nn.Module, batch: dict[int, Tokens], config: Config, ids: SpecialIds
) -> list[list[float]]:
    """[len(batch)][K] B^(1) .. B^(K) of each answer, by the index of its record, in nats."""
    num_draws = config.num_masks[-1]
    plans = []
    for index, found in batch.items():
        lengths = answer_blocks(found, config.block_size)
        plans.append(plan_of(draw_masks(base_seed(index), lengths, num_draws), lengths))
    draws = make_draws(
        [Request(found.context, found.answer, "") for found in batch.values()],
        plans,
        num_draws,
        mask_id=ids.mask,
        pad_id=ids.pad,
        fill=(ids.eos, config.max_length) if config.eos == "padded" else None,
        block_size=config.block_size,
    )
    with autocast(model.device, config.dtype):
        means = prefix_means(draw_values(model, [draws.to(model.device)]).numpy()).T
    if not np.isfinite(means).all():  # else training would meet it, hours later
        at = list(batch)[int(np.flatnonzero(~np.isfinite(means).all(axis=1))[0])]
        raise ValueError(
            f"--model_name_or_path {config.model_name_or_path}: B_ref of answer {at} is not finite: its "
            f"weights hold nan or inf, or overflow in --dtype {config.dtype}"
        )
    return means.tolist()


def write_records(
    config: Config,
    items: Sequence[Labelled],
    encoded: Sequence[Encoded],
    means: Mapping[int, list[float]],
    settings: dict[str, Any],
) -> int:
    """Writes --output_path, and gives the number of its records."""
    lines = []
    for index, (item, found) in enumerate(zip(items, encoded, strict=True)):
        values = means.get(index, [0.0] * config.num_masks[-1])  # nothing is left of the answer
        record = describe(index, item, found, config)
        record |= {"B_ref": {str(k): values[k - 1] for k in config.num_masks}, "fingerprint": settings}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(config.output_path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(config.output_path), "".join(lines))
    return len(lines)


def main(argv: list[str] | None = None) -> None:
    """Writes the records with their reference values."""
    config = parse(Config, argv, description=__doc__)
    if start_processes(__file__, argv, config.num_gpus, config.device):
        return
    run = start_run(config.device)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if run.device.type == "cuda" else "float32"
    path = config.tokenizer_name or config.model_name_or_path
    tokenizer = load_tokenizer(path, chat=True, mask_token_id=config.mask_id)
    reader, losses = config.reader(), Counter()
    items = labelled_answers(
        source_of(config), reader, losses, split=config.split, max_samples=config.max_samples
    )
    encoding = Encoding(
        tokenizer, config.eos, config.apply_chat_template, config.max_length, config.long,
        config.parse_special_tokens, drops_bad=config.bad_records == "drop",
    )  # fmt: skip
    encoded = encode_answers(
        [(where, item.prompt, item.completion) for where, item in items],
        encoding,
        losses,
    )
    usable = [n for n, found in enumerate(encoded) if found.outcome != "bad"]
    items, encoded = [items[n] for n in usable], [encoded[n] for n in usable]
    model = load_model(
        config.model_name_or_path, dtype=config.weights_dtype, device=run.device, mask_token_id=config.mask_id
    ).eval()
    settle_blocks(config, model.config)
    ids = special_ids(model.config, tokenizer)
    if config.mask_token is not None and tokenizer.get_vocab().get(config.mask_token) != ids.mask:
        raise ValueError(f"--mask_token {config.mask_token}: the model's mask token has id {ids.mask}")
    flags = (
        config.eos, config.apply_chat_template, config.dtype, config.weights_dtype, config.block_size,
    )  # fmt: skip
    settings = fingerprint(
        config.model_name_or_path, tokenizer, BrefSettings(config.max_length, ids.mask, *flags)
    )
    if config.parse_special_tokens:
        settings["parse_special_tokens"] = True
    parts = f"{config.output_path}.parts"
    wanted = {**settings, "draws": config.num_masks[-1]}  # fewer are prefixes of these
    job = ResumableJob(parts, wanted, rank=run.rank, world_size=run.world_size)
    tokens = [found.tokens for found in encoded]
    batches = [{i: tokens[i] for i in indices} for indices in batches_of(tokens, config.batch_size)]
    keys = [job.key([[i, t.context.tolist(), t.answer.tolist()] for i, t in b.items()]) for b in batches]
    for n in tqdm(job.share(keys), desc="B_ref", unit="batch", disable=not run.is_main, mininterval=2):
        job.put(keys[n], bounds_of(model, batches[n], config, ids))
    barrier()
    if run.is_main:
        job.read()
        rows = (zip(batch, job[key], strict=True) for batch, key in zip(batches, keys, strict=True))
        means = dict(chain.from_iterable(rows))
        num_records = write_records(config, [item for _, item in items], encoded, means, settings)
        shutil.rmtree(parts)
        counts = Counter(found.outcome for found in encoded)
        lost = describe_losses(losses, num_records + losses[BAD], lost=counts["dropped"])
        print(f"{num_records} records -> {config.output_path}, answers {dict(counts)}{lost}", flush=True)
    end_run()


if __name__ == "__main__":
    run_main(main)
