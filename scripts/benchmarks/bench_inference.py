"""Times the sampler against the published loop: same weights, same prompts, one process, arms taking turns.

Arms:
    reference   LLaDA's published loop as it is published (reference_sampler.py): the whole canvas
                through the model at every step, logits and confidences of every position, every block to
                its end.
    exact       ours, with settings that keep the published tokens. If a text differs from the reference's
                up to the first EOS, the program ends with status 1; so it does for exact's variant nostop.
    A+B+...     ours with other settings: nostop (no early stop), factor, threshold, entropy, klass (parallel
                decoding), dual, prefix (cache), refreshN (cache refreshed every N steps), origin (growing
                canvas), random, sampled, guided (CFG), penalised, remdm, graphs (recorded forwards, on a
                GPU). Some take a number: factor0.5, threshold0.95. For example dual+factor.
    peer-X      with --peer_path CHECKOUT ...: the samplers of LLaDA itself, Fast-dLLM or dllm, on our model.

Columns: tokens/s counts tokens before EOS (decided/s counts all); forwards per such token; ms per call of the
model; the peak of memory above the arm's start (resident on a CPU, allocated on a GPU); texts equal to the
reference's, and tokens; accuracy where the prompts have verifiers. x reference is the median, and range, of
ratios of runs that stood beside one another.

--num_scored N also answers N prompts once with each of our arms, for accuracy.
--invariance runs no clock: it compares answers at batch sizes 1, 3, 8 and with padding on either side, to
prompts cut to unequal lengths, and ends with status 1 where one differs.
--shape 8b-random needs no checkpoint: random weights in bf16, all blocks decided, and a number of tokens per
step set by --tokens_per_step; it prints the share of the hardware's floor that was reached.

Run:
    python scripts/benchmarks/bench_inference.py --model_name_or_path runs/bench_inference_sft \\
        --context 320 --prompts_file runs/quickstart/data/heldout.jsonl --num_prompts 8 --num_scored 500
    python scripts/benchmarks/bench_inference.py --model_name_or_path runs/bench_inference_sft \\
        --context 320 --prompts_file runs/quickstart/data/heldout.jsonl --num_prompts 24 --invariance
    python scripts/benchmarks/bench_inference.py --shape 8b-random --device cuda --arms reference exact dual
"""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    model_name_or_path: str | None = flag(None, help="Checkpoint or run folder.", reads="model")
    prompts_file: str | None = flag(
        None, help="Records with prompts, and verifiers where accuracy is wanted.", reads="path"
    )
    num_prompts: int = flag(16, help="Prompts to time, spread evenly over the file.", at_least=1)
    num_scored: int = flag(
        0, help="Prompts that our arms also answer once, for accuracy; 0: none.", at_least=0
    )
    is_instruct: bool = flag(True, help="Use the chat template.")
    gen_length: int = flag(256, help="Answer length in tokens.", at_least=1)
    block_length: int = flag(32, help="Tokens per block.", at_least=1)
    steps: int | None = flag(
        None, help="Denoising steps over the whole answer; default gen_length.", at_least=1
    )
    batch_size: list[int] = flag(
        [],
        help="Prompts per call of the sampler, one after another; default 1 8 (1 3 8, or 1 with --shape).",
        at_least=1,
    )
    arms: list[str] = flag([], help="What to run; default a selection.")
    repeats: int = flag(3, help="Timed runs of each arm.", at_least=1)
    threads: int | None = flag(None, help="CPU threads; default torch's choice.", at_least=1)
    clock: str = flag(
        "wall",
        help="Of times on prompts. cpu: this process's own seconds, on a machine that has other work too.",
        choices=["wall", "cpu"],
    )
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag(
        "float32", help="Of the weights.", choices=["float32", "bfloat16", "float16", "float64"]
    )
    context: int | None = flag(
        None, help="The model's context in tokens, in place of its config's.", at_least=1
    )
    peer_path: list[str] = flag(
        [], help="Checkouts of LLaDA, Fast-dLLM or dllm, to run their samplers.", reads="path"
    )
    invariance: bool = flag(False, help="Compare batch sizes and paddings instead of timing.")
    shape: str | None = flag(
        None, help="Random weights of this shape instead.", choices=["8b-random", "micro-random"]
    )
    tokens_per_step: list[int] = flag([1], help="With --shape: tokens decided in a step.", at_least=1)
    peak_tflops: float = flag(989.4, help="Of the GPU, dense bf16; H100 and H200 SXM: 989.4.", above=0)
    bandwidth: float = flag(3.35, help="Of the GPU's memory in TB/s; H100 SXM 3.35, H200 4.8.", above=0)
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")
    seed: int = flag(0, help="Of random draws and weights.", at_least=0)

    def settings(self, arm: str) -> "LLaDAGenerationConfig":
        """The sampler's settings for an arm of this run."""
        values = {name: getattr(self, name) for name in ("gen_length", "block_length", "steps", "seed")}
        return settings_of(arm, **values)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch
from transformers import PreTrainedTokenizerBase

from llada.data.prompts import Prompt, read_prompts
from llada.models.checkpoints import load_model
from llada.models.tokens import load_tokenizer, special_ids
from llada.rewards.functions import puzzle_solved
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM
from reference_sampler import left_padded, peer_samplers, reference_sampler
from sampler_arms import Arm, canvas_arm, our_arm, settings_of
from sampler_floor import Gpu
from sampler_shapes import SHAPES, random_model, time_lengths
from sampler_timing import Calls, Result, agreement, describe_machine, print_table, time_arm

TIMED = ["reference", "exact", "exact+nostop", "factor", "threshold", "dual", "prefix+factor", "dual+factor"]
COMPARED = [
    "exact", "sampled", "random", "guided", "penalised", "origin", "factor", "threshold", "entropy", "klass",
    "prefix", "dual", "dual+refresh4", "dual+factor", "prefix+threshold", "dual+klass", "remdm",
]  # fmt: skip
SAME_TEXTS = ("exact", "exact+nostop", "nostop")  # arms that promise the reference's


def check(config: Config) -> None:
    """ValueError for flags that do not go together."""
    if config.repeats < 1 or config.num_prompts < 1 or any(n < 1 for n in config.batch_size):
        raise ValueError("--repeats, --num_prompts and --batch_size must be at least 1")
    if any(k < 1 for k in config.tokens_per_step):
        raise ValueError(f"--tokens_per_step {config.tokens_per_step}: every number must be at least 1")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no GPU here; use --device cpu")
    if config.shape is None and (config.model_name_or_path is None or config.prompts_file is None):
        raise ValueError("give --model_name_or_path and --prompts_file, or --shape")
    if config.clock == "cpu" and config.threads != 1:
        raise ValueError("--clock cpu adds up the seconds of all threads; it needs --threads 1")
    if config.clock == "cpu" and config.device != "cpu":
        raise ValueError(f"--clock cpu says nothing of --device {config.device}")
    if config.invariance and "reference" in config.arms:
        raise ValueError("--invariance compares our arms; leave reference out of --arms")
    for arm in config.arms:
        if arm != "reference":
            config.settings(arm)


def prompts_of(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """`count` prompts spread evenly over the file, in its order."""
    found, _ = read_prompts(config.prompts_file, tokenizer, chat=config.is_instruct)
    count = min(count, len(found))
    prompts = [found[i * len(found) // count] for i in range(count)]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    print(f"{count} prompts of {min(lengths)} to {max(lengths)} tokens", flush=True)
    return prompts


def batches_of(prompts: list[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches of prompts of like length, as inference/generate.py forms them."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    return [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]


def accuracies(
    tokens: dict[int, list[int]], prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Share of answers that their verifiers accept: all prompts, and each task; nan for prompts without."""
    scores: dict[str, list[float]] = {}
    for prompt in prompts:
        if "task" in prompt.record and "metadata" in prompt.record:
            text = tokenizer.decode(tokens[prompt.index], skip_special_tokens=True)
            scores.setdefault(prompt.record["task"], []).append(puzzle_solved(text, prompt.record))
    everything = [value for values in scores.values() for value in values]
    return {
        "accuracy": statistics.mean(everything) if everything else math.nan,
        **{task: statistics.mean(values) for task, values in scores.items()},
    }


# --- times


def time_on_prompts(
    config: Config, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The tables of times, one for each batch size; then, with --num_scored, that of accuracies."""
    names = config.arms or TIMED
    published = config.settings("exact")
    ours = {name: our_arm(model, config.settings(name)) for name in names if name != "reference"}
    others = {"reference": reference_sampler(model, published)} if "reference" in names else {}
    for path in config.peer_path:
        others |= peer_samplers(path, model, published)
    arms = {name: canvas_arm(model, sampler) for name, sampler in others.items()} | ours

    prompts, calls, rows = prompts_of(config, tokenizer, config.num_prompts), Calls(model), []
    for batch_size in config.batch_size or [1, 8]:
        batches = batches_of(prompts, batch_size)
        results = measure(arms, batches, config, calls, model.device)
        table = [
            {"batch": batch_size, **row, **accuracies(results[row["arm"]].tokens, prompts, tokenizer)}
            for row in summarize(results)
        ]
        print_table(table)
        rows += table
    if config.num_scored:
        prompts = prompts_of(config, tokenizer, config.num_scored)
        batches = batches_of(prompts, max(config.batch_size or [8]))
        table = []
        for name, arm in ours.items():
            shares = accuracies(answer_all(arm, batches), prompts, tokenizer)
            table.append({"arm": name, "prompts": len(prompts), **shares})
            print_table(table[-1:])
        rows += table
    return rows


def measure(
    arms: dict[str, Arm], batches: list[list[Prompt]], config: Config, calls: Calls, device: torch.device
) -> dict[str, Result]:
    """What each arm did. The arms take turns, in another order each time."""
    results = {name: Result() for name in arms}
    fastest = list(arms)[-1]
    arms[fastest](batches[0])  # warms up kernels and allocator
    names, clock = list(arms), time.process_time if config.clock == "cpu" else time.perf_counter
    for repeat in range(config.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            time_arm(arms[name], batches, results[name], calls, device, clock)
    return results


def summarize(results: dict[str, Result]) -> list[dict[str, Any]]:
    """A row of the table for each arm; ratios are to the first arm."""
    base, rows = next(iter(results.values())), []
    for name, result in results.items():
        rates = [result.num_tokens / s for s in result.seconds]
        ratios = [rate * s / base.num_tokens for rate, s in zip(rates, base.seconds, strict=True)]
        num_equal, share = agreement(result.tokens, base.tokens)
        rows.append(
            {
                "arm": name, "tokens/s": statistics.median(rates),
                "decided/s": result.num_decided / statistics.median(result.seconds),
                "forwards/token": result.num_sequences / max(1, result.num_tokens),
                "ms/forward": 1000 * statistics.median(result.seconds) / max(1, result.num_calls),
                "peak MiB": result.memory, "equal texts": f"{num_equal}/{len(result.tokens)}",
                "equal tokens": share, f"x {next(iter(results))}": statistics.median(ratios),
                "min": min(ratios), "max": max(ratios),
            }
        )  # fmt: skip
    return rows


def answer_all(arm: Arm, batches: list[list[Prompt]]) -> dict[int, list[int]]:
    """The arm's answers by prompt."""
    answers: dict[int, list[int]] = {}
    for batch in batches:
        answers |= zip([p.index for p in batch], arm(batch).tokens, strict=True)
    return answers


# --- the same answers in any batch


def compare_batches(
    config: Config, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """For each arm, how many texts differ from those at the first batch size."""
    prompts = [  # of unequal lengths, so that batches need padding
        replace(prompt, token_ids=prompt.token_ids[i % min(7, len(prompt.token_ids)) :])
        for i, prompt in enumerate(prompts_of(config, tokenizer, config.num_prompts))
    ]
    first, *others = config.batch_size or [1, 3, 8]
    rows = []
    for name in config.arms or COMPARED:
        settings = config.settings(name)
        expected = answers_by(model, prompts, settings, first, None)
        row: dict[str, Any] = {"arm": name, "texts": len(prompts), "distinct": len(set(map(tuple, expected)))}
        for batch_size in others:
            for side in (None, "left", "right"):
                answers = answers_by(model, prompts, settings, batch_size, side)
                num = sum(a != b for a, b in zip(answers, expected, strict=True))
                row[f"{batch_size} {side or 'lists'}"] = num
        rows.append(row)
    print_table(rows)
    return rows


def answers_by(
    model: LLaDAModelLM,
    prompts: list[Prompt],
    settings: LLaDAGenerationConfig,
    batch_size: int,
    side: str | None,
) -> list[list[int]]:
    """The answers in batches of the given order: lists of tokens, or tensors padded on a side."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs: dict[str, Any] = {"input_ids": [p.token_ids for p in batch]}
        if side is not None:
            ids, keep = left_padded(inputs["input_ids"], model)
            if side == "right":  # each row's padding goes to its end
                order = keep.argsort(dim=1, descending=True, stable=True)
                ids, keep = ids.gather(1, order), keep.gather(1, order)
            inputs = {"input_ids": ids, "attention_mask": keep}
        output = model.generate(
            **inputs,
            generation_config=settings,
            return_dict_in_generate=True,
            record_ids=[p.index for p in batch],
        )
        answers += output.completions
    return answers


def time_shape(config: Config) -> list[dict[str, Any]]:
    """The table of times and floors of a model of random weights."""
    shape = SHAPES[config.shape]
    model = random_model(shape, config.device, config.seed)
    calls, rows = Calls(model), []
    for num_prompt, gen_length in shape.lengths:
        for batch_size in config.batch_size or [1]:
            rows += time_lengths(
                model, calls, num_prompt, gen_length, names=config.arms or ["reference", "exact", "dual"],
                tokens_per_step=config.tokens_per_step, block_length=config.block_length,
                batch_size=batch_size, repeats=config.repeats, seed=config.seed,
                gpu=Gpu(config.peak_tflops, config.bandwidth), peer_path=config.peer_path,
            )  # fmt: skip
    print_table(rows)
    return rows


def is_as_promised(row: dict[str, Any], config: Config) -> bool:
    """Whether exact texts are the reference's, and batches change nothing."""
    if config.invariance:
        return not any(value for name, value in row.items() if name[0].isdigit())
    if row["arm"] not in SAME_TEXTS or "x reference" not in row:
        return True
    num_equal, _, num = row["equal texts"].partition("/")
    return num_equal == num


def main(argv: list[str] | None = None) -> None:
    """Prints the tables; status 1 if an answer is not what its arm promises."""
    config = parse(Config, argv, description=__doc__)
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    machine = describe_machine(config.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    if config.shape is not None:
        rows = time_shape(config)
    else:
        tokenizer = load_tokenizer(config.model_name_or_path, chat=config.is_instruct)
        model = load_model(config.model_name_or_path, dtype=config.dtype, device=config.device).eval()
        model.config.eot_token_id = special_ids(model.config, tokenizer).eot
        if config.context is not None:
            model.config.max_sequence_length = config.context
        rows = (compare_batches if config.invariance else time_on_prompts)(config, model, tokenizer)
    if config.output is not None:
        report = {"config": asdict(config), **machine, "rows": rows}
        Path(config.output).write_text(json.dumps(report, indent=1))
    failed = [row for row in rows if not is_as_promised(row, config)]
    if failed:
        print(f"FAILED: {len(failed)} arms differ where they must not: {failed}", flush=True)
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
