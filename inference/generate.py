"""Answer prompts with a LLaDA checkpoint: one prompt to the terminal, or a file of prompts to a JSONL file.

Prompts come from --prompt, from a text file (one prompt a line), or from JSONL / Parquet records (`prompt`,
`question`, `instruction`, `text`, or `messages`). With --is_instruct they go through the chat template.
The output has one line {"id", "prompt", "completion"} for each prompt, in input order; the id is the record's
own, else its number. An answer depends on the prompt, its number in the file, and the flags; never on batch
size, number of processes, or order.

Under torchrun the prompts are shared out over the processes. Finished answers are kept in
<output_path>.parts until all are there: the same command after a kill goes on where it stopped.

The defaults give the tokens of LLaDA's published sampler. --parallel_decoding, --cache and --remdm are
faster, or different, and approximate.

Run:
    python inference/generate.py --model_name_or_path runs/quickstart/sft --is_instruct \\
        --prompt "What is 3 + 4?" --gen_length 64
    torchrun --nproc_per_node 2 inference/generate.py --model_name_or_path runs/quickstart/sft \\
        --is_instruct --prompts_file runs/quickstart/data/heldout.jsonl --output_path runs/answers.jsonl \\
        --method semi_autoregressive_padding --gen_length 64 --block_length 32
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.data.prompts import Prompt, PromptFlags
from llada.diffusion.likelihood import Request, score
from llada.flags import flag, parse
from llada.inference.sampler_flags import SamplerFlags, sampler_settings
from llada.models import describe_checkpoint, load_model, load_tokenizer, special_ids
from llada.resumable import ResumableJob, write_atomically
from llada.rewards.verifiers import final_answer
from llada.run import barrier, end_run, start_run
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

log = logging.getLogger("generate")


@dataclass(kw_only=True)
class Config(PromptFlags, SamplerFlags):
    """Flags of this script, beside those of the sampler."""

    model_name_or_path: str = flag(
        help="Checkpoint or run folder, LoRA adapter folder, or hub name.", aliases=["model_path"]
    )
    adapter_path: str | None = flag(None, help="LoRA adapter to put on the model.")
    dtype: str = flag(
        "auto", help="Of the weights.", choices=["auto", "float32", "bfloat16", "float16", "float64"]
    )
    device: str | None = flag(None, help="cpu, cuda, ...; default the GPU of this process, else the CPU.")
    attn_implementation: str | None = flag(None, help="Attention kernel by transformers' name.")
    num_gpus: int = flag(
        1, help="For several GPUs start with torchrun --nproc_per_node; this only checks it."
    )
    batch_size: int = flag(8, help="Prompts generated together.")
    long_prompts: str = flag(
        "error",
        help="Prompts that with their answer exceed the context: stop, leave them out, or keep their end.",
        choices=["error", "drop", "truncate"],
    )
    trace: str | None = flag(None, help="JSONL file that receives every denoising step.")

    num_return_sequences: int = flag(1, help="Answers per prompt; all are written as `completions`.")
    best_of: str = flag(
        "first",
        help="Which of several answers is `completion`: the first, the one whose final answer is the most "
        "frequent, or the most likely one for its length.",
        choices=["first", "majority", "likelihood"],
    )


# Flags that change neither an answer nor which prompts have one: a killed run may go on with others.
FREE = (
    *("model_name_or_path", "adapter_path"),  # their contents count, not their names
    *("prompt", "prompts_file", "output_path", "max_samples", "trace"),
    *("device", "num_gpus", "batch_size", "cuda_graphs"),
)


def answer_batches(
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Prompt],
    settings: LLaDAGenerationConfig,
    config: Config,
    trace_file: TextIO | None,
) -> Iterator[tuple[Prompt, dict[str, Any], int]]:
    """(prompt, its fields of the output, tokens generated), prompts of like length together."""
    items = sorted(items, key=lambda item: len(item.token_ids))
    num = settings.num_return_sequences
    for start in range(0, len(items), config.batch_size):
        batch = items[start : start + config.batch_size]
        output = model.generate(
            [item.token_ids for item in batch],
            generation_config=settings,
            record_ids=[item.index for item in batch],
            return_trace=trace_file is not None,
        )
        for entry in output.trace or []:
            item = batch[entry["row"] // num]
            entry = {"id": item.name, "candidate": entry.pop("row") % num, **entry}
            trace_file.write(json.dumps(entry) + "\n")
        for i, item in enumerate(batch):
            rows = range(i * num, (i + 1) * num)
            answers = [output.completions[row] for row in rows]
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            best = choose(config.best_of, model, item, answers, texts, config)
            fields = {"completion": texts[best], "steps": int(output.steps[rows[best]])}
            if num > 1:
                fields["completions"] = texts
            yield item, fields, sum(map(len, answers))


def choose(
    rule: str, model: LLaDAModelLM, item: Prompt, answers: list[list[int]], texts: list[str], config: Config
) -> int:
    """Which candidate to put first; of equals the earlier one."""
    if rule == "majority":
        finals = [final_answer(text) for text in texts]
        counts = Counter(final for final in finals if final)
        return max(range(len(finals)), key=lambda i: counts[finals[i]])
    if rule == "likelihood":
        requests = [
            Request(tuple(item.token_ids), tuple(answer), f"{item.index}")
            for answer in answers
            if answer  # an empty answer has no tokens to score and loses against any other
        ]
        scores = iter(score(model, requests, num_samples=32, seed=config.seed, batch_size=config.batch_size))
        means = [next(scores).log_likelihood / len(a) if a else -float("inf") for a in answers]
        return max(range(len(means)), key=means.__getitem__)
    return 0


def merge(items: list[Prompt], answers: ResumableJob, output_path: Path) -> None:
    """Writes all answers in input order; the file appears whole or not at all."""
    lines = [
        {"id": item.name, "prompt": item.shown, **answers[answers.key(item.index, item.token_ids)]}
        for item in items
    ]
    write_atomically(output_path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> None:
    """Answers the prompts."""
    config = parse(Config, argv, description=__doc__)
    settings = sampler_settings(config)
    if config.best_of != "first" and config.num_return_sequences == 1:
        raise ValueError(f"--best_of {config.best_of} chooses among answers: set --num_return_sequences")
    run = start_run(config.device)
    if config.num_gpus not in (1, run.world_size):
        raise ValueError(
            f"--num_gpus {config.num_gpus}: start with torchrun --nproc_per_node {config.num_gpus}; "
            f"this run has {run.world_size} process(es)"
        )
    tokenizer = load_tokenizer(config.model_name_or_path, chat=config.is_instruct)
    model = load_model(
        config.model_name_or_path,
        dtype=config.dtype,
        adapter_path=config.adapter_path,
        attn_implementation=config.attn_implementation,
        device=run.device,
    )
    model.config.eot_token_id = special_ids(model.config, tokenizer).eot
    items, counts = config.read(
        tokenizer,
        context=model.config.max_sequence_length,
        gen_length=config.gen_length,
        long=config.long_prompts,
    )
    if run.is_main:
        for what, count in counts.items():
            print(f"{what}: {count}", flush=True)
        if settings.is_approximate:
            print("approximate: other tokens than the published sampler's are possible", flush=True)

    parts = None if config.output_path is None else f"{config.output_path}.parts"
    settings_of_answers = {
        **{name: value for name, value in asdict(config).items() if name not in FREE},
        "checkpoint": describe_checkpoint(config.model_name_or_path, config.adapter_path),
    }
    answers = ResumableJob(parts, settings_of_answers, rank=run.rank, world_size=run.world_size)
    keys = {item.index: answers.key(item.index, item.token_ids) for item in items}
    mine = [items[n] for n in answers.share(list(keys.values()))]
    trace_file = None
    if config.trace is not None:
        path = config.trace if run.world_size == 1 else f"{config.trace}.rank{run.rank}"
        goes_on = len(mine) < len(items[run.rank :: run.world_size])
        trace_file = open(path, "a" if goes_on else "w", encoding="utf-8")  # noqa: SIM115 - closed below

    num_tokens, started = 0, time.time()
    bar = tqdm(total=len(mine), desc="answers", unit="prompt", disable=not run.is_main or len(mine) < 2)
    for item, fields, num in answer_batches(model, tokenizer, mine, settings, config, trace_file):
        answers.put(keys[item.index], fields)
        num_tokens += num
        bar.set_postfix_str(f"{num_tokens / (time.time() - started):.0f} tok/s", refresh=False)
        bar.update()
    bar.close()
    if trace_file is not None:
        trace_file.close()
    barrier()
    if run.is_main and config.output_path is None:
        for item in items:
            print(answers[keys[item.index]]["completion"])
    elif run.is_main:
        answers.read()
        merge(items, answers, Path(config.output_path))
        shutil.rmtree(parts)
        print(f"{len(items)} answers -> {config.output_path}", flush=True)
    end_run()


if __name__ == "__main__":
    main()
