"""Answer prompts with a LLaDA checkpoint: one prompt to the terminal, or a file of prompts to a JSONL file.

The output has one line {"id", "prompt", "completion"} for each prompt, in input order. An answer depends on
the prompt, its number in the file, and the flags; never on batch size, number of processes, or order. Under
torchrun, and with --num_gpus, processes share the prompts; the same command after a kill continues. The
defaults give the tokens of LLaDA's published sampler. More: docs/generation.md.

Run:
    python inference/generate.py --model_name_or_path runs/quickstart/sft --is_instruct \\
        --prompt "What is 3 + 4?" --gen_length 64
    torchrun --nproc_per_node 2 inference/generate.py --model_name_or_path runs/quickstart/sft \\
        --is_instruct --prompts_file runs/quickstart/data/heldout.jsonl --output_path runs/answers.jsonl \\
        --method semi_autoregressive_padding --gen_length 64 --block_length 32
"""

import glob
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llada.data.flags import PromptFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.inference.sampler_flags import ModelFlags, SamplerFlags, sampler_settings


@dataclass(kw_only=True)
class Config(PromptFlags, ModelFlags, SamplerFlags):
    """Generation."""

    num_return_sequences: int = flag(1, "Answers per prompt; all are written as `completions`.", at_least=1)
    best_of: str = flag(
        "first",
        "Which of several answers is `completion`: the first, the one whose final answer is the most "
        "frequent, or the most likely one for its length.",
        choices=["first", "majority", "likelihood"],
    )
    completion_format: str = flag(
        "text",
        "Of `completion` in the output: a text, or messages, and then of `prompt` too.",
        choices=["text", "messages"],
    )
    long_prompts: str = flag(
        "error",
        "Prompts that with their answer exceed the context: stop, leave them out, or keep their end.",
        choices=["error", "drop", "truncate"],
    )
    batch_size: int = flag(8, "Prompts generated together.", at_least=1)
    num_gpus: int = flag(1, "Processes to start, at most one a GPU (without GPUs, a CPU core).", at_least=1)
    trace: str | None = flag(None, "JSONL file that receives every denoising step.", writes="file")
    report_path: str | None = flag(
        None,
        "JSON file that receives this call's tokens, seconds, tokens a second.",
        writes="file",
    )

    def check_flags(self) -> None:
        """Several answers to choose from."""
        if self.best_of != "first" and self.num_return_sequences == 1:
            raise ValueError(
                f"--best_of {self.best_of}: has no effect without --num_return_sequences 2 or more"
            )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.data.final_answer import final_answer
from llada.data.prompts import Prompt, read_asked_prompts
from llada.diffusion.likelihood import Request, score_answers
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from llada.models.building import load_for_inference
from llada.models.checkpoints import describe_checkpoint
from llada.resumable import ResumableJob, write_atomically
from llada.run import Run, end_run, max_over_ranks, start_processes, start_run, sum_over_ranks
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

# Flags that change neither an answer nor which prompts have one: a killed run may go on with others.
FREE = (
    *("model_name_or_path", "adapter_path"),  # their contents count, not their names
    *("prompt", "prompts_file", "output_path", "max_samples", "trace", "report_path"),
    *("device", "num_gpus", "batch_size", "cuda_graphs", "completion_format"),
)


def answer_batches(
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    settings: LLaDAGenerationConfig,
    config: Config,
    trace_file: TextIO | None,
) -> Iterator[tuple[Prompt, dict[str, Any], int]]:
    """(prompt, its fields of the output, tokens generated), prompts of like length together."""
    # like lengths share a batch: the sampler is ragged, but short answers wait for long ones
    prompts = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    num = settings.num_return_sequences
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        output = model.generate(
            [prompt.token_ids for prompt in batch],
            generation_config=settings,
            return_dict_in_generate=True,
            record_ids=[prompt.index for prompt in batch],
            return_trace=trace_file is not None,
        )
        for entry in output.trace or []:
            prompt = batch[entry["row"] // num]
            entry = {"id": prompt.name, "candidate": entry.pop("row") % num, **entry}
            trace_file.write(json.dumps(entry) + "\n")
        for i, prompt in enumerate(batch):
            rows = range(i * num, (i + 1) * num)
            answers = [output.completions[row] for row in rows]
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            best = choose(config, model, prompt, answers, texts)
            fields = {"completion": texts[best], "steps": int(output.steps[rows[best]])}
            if num > 1:
                fields["completions"] = texts
            yield prompt, fields, sum(map(len, answers))


def choose(
    config: Config, model: LLaDAModelLM, prompt: Prompt, answers: list[list[int]], texts: list[str]
) -> int:
    """Which candidate to put first, by --best_of; of equals the earlier one."""
    if config.best_of == "majority":
        finals = [final_answer(text) for text in texts]
        counts = Counter(final for final in finals if final)
        return max(range(len(finals)), key=lambda i: counts[finals[i]])
    if config.best_of == "likelihood":
        # an empty answer has no tokens to score and loses against any other
        requests = [Request(tuple(prompt.token_ids), tuple(a), f"{prompt.index}") for a in answers if a]
        settings = LikelihoodSettings("elbo", MaskSettings(32), config.seed, config.batch_size)
        scores = iter(score_answers(model, requests, settings))
        means = [next(scores).log_likelihood / len(a) if a else -float("inf") for a in answers]
        return max(range(len(means)), key=means.__getitem__)
    return 0


def answer(
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    settings: LLaDAGenerationConfig,
    config: Config,
    job: ResumableJob,
    run: Run,
) -> dict[str, float]:
    """Answers this rank's share of the prompts, and notes each answer at once; the speed of all ranks."""
    keys = [key_of(prompt) for prompt in prompts]
    mine = job.share(keys)
    with ExitStack() as stack:
        trace_file = None
        if config.trace is not None:
            path = f"{config.trace}.rank{run.rank}"  # a killed run's trace is continued
            continues = len(mine) < len(keys[run.rank :: run.world_size])
            trace_file = stack.enter_context(open(path, "a" if continues else "w", encoding="utf-8"))
        num_tokens, started = 0, time.time()
        silent = not run.is_main or len(mine) < 2
        bar = stack.enter_context(tqdm(total=len(mine), desc="answers", unit="prompt", disable=silent))
        wanted = [prompts[n] for n in mine]
        for prompt, fields, num in answer_batches(model, tokenizer, wanted, settings, config, trace_file):
            job.put(key_of(prompt), fields)
            num_tokens += num
            bar.set_postfix_str(f"{num_tokens / (time.time() - started):.0f} tok/s", refresh=False)
            bar.update()
        seconds = max_over_ranks(time.time() - started)
    (tokens,) = sum_over_ranks([num_tokens])  # of a continued run, what was left to do
    job.read()
    return {"tokens": int(tokens), "seconds": seconds, "tokens_per_second": tokens / seconds}


def key_of(prompt: Prompt) -> str:
    """The name of a prompt's answer in the job."""
    return ResumableJob.key(prompt.index, prompt.token_ids)


def finish(config: Config, prompts: list[Prompt], job: ResumableJob) -> None:
    """Prints the answers, or writes them in input order; the file appears whole or not at all."""
    lines = []
    for prompt in prompts:
        fields = job[key_of(prompt)]
        if config.output_path is None:
            print(fields["completion"])
        line = {"id": prompt.name, "prompt": prompt.shown, **fields}
        if config.completion_format == "messages":
            completion = [{"role": "assistant", "content": fields["completion"]}]
            line |= {"prompt": prompt.prompt, "completion": completion}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if config.trace is not None:
        parts = sorted(Path(config.trace).parent.glob(f"{glob.escape(Path(config.trace).name)}.rank*"))
        write_atomically(Path(config.trace), "".join(part.read_text(encoding="utf-8") for part in parts))
        for part in parts:
            part.unlink()
    if config.output_path is not None:
        write_atomically(Path(config.output_path), "".join(lines))
        shutil.rmtree(job.folder)
        print(f"{len(lines)} answers -> {config.output_path}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Answers the prompts."""
    config = parse(Config, argv, description=__doc__)
    settings = sampler_settings(config)
    if start_processes(__file__, argv, config.num_gpus, config.device):
        return
    run = start_run(config.device)
    model, tokenizer = load_for_inference(**config.to_load(), chat=config.is_instruct, device=run.device)
    context = model.config.max_sequence_length
    prompts = read_asked_prompts(
        config, tokenizer, context=context, gen_length=config.gen_length, long=config.long_prompts
    )
    if run.is_main and settings.is_approximate:
        print("approximate: other tokens than the published sampler's are possible", flush=True)
    made_with = {name: value for name, value in asdict(config).items() if name not in FREE}
    made_with["checkpoint"] = describe_checkpoint(config.model_name_or_path, config.adapter_path)
    parts = config.output_path and f"{config.output_path}.parts"
    job = ResumableJob(parts, made_with, rank=run.rank, world_size=run.world_size)
    speed = answer(model, tokenizer, prompts, settings, config, job, run)
    if run.is_main:
        if config.report_path is not None:
            write_atomically(Path(config.report_path), json.dumps(speed, indent=2) + "\n")
        finish(config, prompts, job)
    end_run()


if __name__ == "__main__":
    run_main(main)
