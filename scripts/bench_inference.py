"""Times the sampler against the published loop: same weights, same prompts, one process, arms taking turns.

Arms:
    reference   LLaDA's published loop as it is published (llada/bench/reference_sampler.py): the whole canvas
                through the model at every step, logits and confidences of every position, every block to
                its end.
    exact       ours, with settings that keep the published tokens. If a text differs from the reference's
                up to the first EOS, the program ends with status 1.
    A+B+...     ours with other settings: factor, threshold, entropy, klass (parallel decoding), dual, prefix
                (cache), refreshN (cache refreshed every N steps), nostop (no early stop), origin (growing
                canvas), random, sampled, guided (CFG), remdm. For example dual+factor.
    peer-X      with --peer_path CHECKOUT ...: the samplers of LLaDA itself, Fast-dLLM or dllm, on our model.

Columns: tokens/s counts tokens before EOS (decided/s counts all); forwards per such token; ms per call of the
model; the peak of memory above the arm's start (resident on a CPU, allocated on a GPU); texts equal to the
reference's, and tokens; accuracy where the prompts have verifiers. x reference is the median, and range, of
ratios of runs that stood beside one another.

--invariance runs no clock: it compares answers at batch sizes 1, 3, 8 and with padding on either side.
--shape 8b-random needs no checkpoint: random weights in bf16, all blocks decided, and a number of tokens per
step set by --tokens_per_step; it prints the share of the hardware's floor that was reached.

Run:
    python scripts/bench_inference.py --model_name_or_path runs/quickstart/sft --context 512 \\
        --prompts_file runs/quickstart/data/heldout.jsonl --num_prompts 24 --num_scored 500
    python scripts/bench_inference.py --model_name_or_path runs/quickstart/sft --context 512 \\
        --prompts_file runs/quickstart/data/heldout.jsonl --invariance
    python scripts/bench_inference.py --shape 8b-random --device cuda --arms reference exact dual
"""

import json
import math
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llada.bench.reference_sampler import left_padded, peer_samplers, reference_sampler
from llada.bench.sampler_floor import Gpu, sampler_floor
from llada.bench.sampler_timing import Arm, Calls, Prompt, Result, agreement, canvas_arm, our_arm, time_arm
from llada.chat import render_prompt
from llada.config import flag, parse, read_yaml
from llada.messages import to_prompt
from llada.model import DTYPES, ROOT, load_model, load_tokenizer, special_ids
from llada.records import read_records
from llada.rewards import score
from modelling_final import LLaDAConfig, LLaDAGenerationConfig, LLaDAModelLM

# P prompt tokens, G answer tokens, L = P + G

ATOMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "nostop": {"early_stop": False},
    "origin": {"method": "semi_autoregressive_origin"},
    "random": {"remasking": "random"},
    "sampled": {"temperature": 1.0},
    "guided": {"cfg_scale": 0.5},
    "penalised": {"repetition_penalty": 1.2},
    "remdm": {"remdm": "cap", "temperature": 1.0},
    **{rule: {"parallel_decoding": rule} for rule in ("factor", "threshold", "entropy", "klass")},
    **{cache: {"cache": cache} for cache in ("dual", "prefix")},
}
TIMED = ["reference", "exact", "factor", "threshold", "dual", "prefix+factor", "dual+factor"]
COMPARED = [
    "exact", "sampled", "random", "guided", "penalised", "origin", "factor", "threshold", "entropy", "klass",
    "prefix", "dual", "dual+refresh4", "dual+factor", "prefix+threshold", "dual+klass", "remdm",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model of random weights (a size in configs/models, or fields) and the (P, G) to time it at."""

    model: str | dict[str, int]
    vocab_size: int
    lengths: tuple[tuple[int, int], ...]
    dtype: str


SHAPES = {
    "8b-random": Shape("8b", LLaDAConfig().embedding_size, ((128, 128), (768, 256)), "bfloat16"),
    "micro-random": Shape(
        {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 48},
        200,
        ((8, 16),),
        "float32",
    ),
}


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    model_name_or_path: str | None = flag(None, help="Checkpoint or run folder.", aliases=["model_path"])
    prompts_file: str | None = flag(
        None, help="Records with prompts, and verifiers where accuracy is wanted."
    )
    num_prompts: int = flag(16, help="Prompts to time, spread evenly over the file.")
    num_scored: int = flag(0, help="Prompts that our arms also answer once, for accuracy; 0: none.")
    is_instruct: bool = flag(True, help="Use the chat template.")
    gen_length: int = flag(256, help="Answer length in tokens.")
    block_length: int = flag(32, help="Tokens per block.")
    steps: int | None = flag(None, help="Denoising steps over the whole answer; default gen_length.")
    batch_size: list[int] = flag(
        [], help="Prompts per call of the sampler, one after another; default 1 8 (1 3 8, or 1 with --shape)."
    )
    arms: list[str] = flag([], help="What to run; default a selection.")
    repeats: int = flag(3, help="Timed runs of each arm.")
    threads: int | None = flag(None, help="CPU threads; default torch's choice.")
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag(
        "float32", help="Of the weights.", choices=["float32", "bfloat16", "float16", "float64"]
    )
    context: int | None = flag(None, help="The model's context in tokens, in place of its config's.")
    peer_path: list[str] = flag([], help="Checkouts of LLaDA, Fast-dLLM or dllm, to run their samplers.")
    invariance: bool = flag(False, help="Compare batch sizes and paddings instead of timing.")
    shape: str | None = flag(None, help="Random weights of this shape instead.", choices=list(SHAPES))
    tokens_per_step: list[int] = flag([1], help="With --shape: tokens decided in a step.")
    peak_tflops: float = flag(989.4, help="Of the GPU, dense bf16; H100 and H200 SXM: 989.4.")
    bandwidth: float = flag(3.35, help="Of the GPU's memory in TB/s; H100 SXM 3.35, H200 4.8.")
    output: str | None = flag(None, help="JSON file for all numbers.")
    seed: int = flag(0, help="Of random draws and weights.")


def settings_of(arm: str, config: Config, **more: Any) -> LLaDAGenerationConfig:
    """The settings that an arm's name stands for."""
    names = ("gen_length", "block_length", "steps", "seed")
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values |= {"method": "semi_autoregressive_padding", **more}
    for atom in arm.split("+"):
        refresh = re.fullmatch(r"refresh(\d+)", atom)
        if refresh:
            values["cache_refresh_interval"] = int(refresh[1])
        elif atom in ATOMS:
            values |= ATOMS[atom]
        else:
            raise ValueError(
                f"--arms {arm}: no part {atom!r}; known: reference, {', '.join(ATOMS)}, refreshN"
            )
    return LLaDAGenerationConfig(**values)


# --- what is run


def make_arms(names: list[str], model: LLaDAModelLM, config: Config) -> dict[str, Arm]:
    """The arms to run by name, and those of the checkouts."""
    published = settings_of("exact", config)
    arms = {}
    for name in names:
        if name == "reference":
            arms[name] = canvas_arm(model, reference_sampler(model, published))
        else:
            arms[name] = our_arm(model, settings_of(name, config))
    for path in config.peer_path:
        for name, sampler in peer_samplers(path, model, published).items():
            arms[name] = canvas_arm(model, sampler)
    return arms


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """`count` prompts spread evenly over the file, in its order."""
    records = list(read_records(config.prompts_file, text_documents="line"))
    count = min(count, len(records))
    prompts = []
    for index in (i * len(records) // count for i in range(count)):
        where, record = records[index]
        prompt: Any = to_prompt(record, where)
        prompt = prompt if config.is_instruct else prompt[0]["content"]
        token_ids = render_prompt(prompt, tokenizer, chat=config.is_instruct)
        prompts.append(Prompt(index, token_ids, record))
    return prompts


def batches_of(prompts: list[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches of prompts of like length, as inference/generate.py forms them."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    return [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]


def accuracy(
    tokens: dict[int, list[int]], prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Share of answers that their verifiers accept; nan for prompts without."""
    checked = [p for p in prompts if "task" in p.record and "metadata" in p.record]
    if not checked:
        return math.nan
    texts = [tokenizer.decode(tokens[p.index], skip_special_tokens=True) for p in checked]
    return sum(score(text, p.record) for text, p in zip(texts, checked, strict=True)) / len(checked)


def measure(
    arms: dict[str, Arm],
    prompts: list[Prompt],
    batch_size: int,
    config: Config,
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """One row of the table for each arm. The arms take turns, in another order each time."""
    batches, calls = batches_of(prompts, batch_size), Calls(model)
    results = {name: Result() for name in arms}
    for name, arm in arms.items():  # one step warms up kernels and allocator
        if name != "reference":
            arm(batches[0][:1])
    names = list(arms)
    for repeat in range(config.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            time_arm(arms[name], batches, results[name], calls, model.device)
    base = results.get("reference", results[names[0]])
    rows = []
    for name, result in results.items():
        rates = [result.num_tokens / s for s in result.seconds]
        ratios = [rate * s / base.num_tokens for rate, s in zip(rates, base.seconds, strict=True)]
        num_equal, share = agreement(result.tokens, base.tokens)
        rows.append(
            {
                "batch": batch_size, "arm": name, "tokens/s": statistics.median(rates),
                "decided/s": result.num_decided / statistics.median(result.seconds),
                "forwards/token": result.num_sequences / max(1, result.num_tokens),
                "ms/forward": 1000 * statistics.median(result.seconds) / max(1, result.num_calls),
                "peak MiB": result.memory, "equal texts": f"{num_equal}/{len(prompts)}",
                "equal tokens": share, "accuracy": accuracy(result.tokens, prompts, tokenizer),
                "x reference": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
            }
        )  # fmt: skip
    return rows


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows under their names, columns aligned."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([_shown(value) for value in row.values()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


# --- the three modes


def time_on_prompts(
    config: Config, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The table of times; then, with --num_scored, the table of accuracies."""
    arms = make_arms(config.arms or TIMED, model, config)
    prompts = read_prompts(config, tokenizer, config.num_prompts)
    rows = []
    for batch_size in config.batch_size or [1, 8]:
        table = measure(arms, prompts, batch_size, config, model, tokenizer)
        print_table(table)
        print(flush=True)
        rows += table
    if config.num_scored:
        prompts = read_prompts(config, tokenizer, config.num_scored)
        ours = {name: arm for name, arm in arms.items() if name in config.arms or name in TIMED}
        ours.pop("reference", None)  # its answers are those of exact, and it takes the longest
        table = []
        for name, arm in ours.items():
            tokens: dict[int, list[int]] = {}
            for batch in batches_of(prompts, max(config.batch_size or [8])):
                tokens |= zip([p.index for p in batch], arm(batch).tokens, strict=True)
            share = accuracy(tokens, prompts, tokenizer)
            table.append({"arm": name, "prompts": len(prompts), "accuracy": share})
        print_table(table)
        rows += table
    return rows


def answers_by(
    model: LLaDAModelLM,
    prompts: list[Prompt],
    settings: LLaDAGenerationConfig,
    batch_size: int,
    side: str | None,
) -> list[list[int]]:
    """The answers in batches of the file's order: lists of tokens, or tensors padded on a side."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs: dict[str, Any] = {"input_ids": [p.token_ids for p in batch]}
        if side is not None:
            ids, keep = left_padded(inputs["input_ids"], model)
            if side == "right":
                # roll each row's padding to its end
                order = keep.argsort(dim=1, descending=True, stable=True)
                ids, keep = ids.gather(1, order), keep.gather(1, order)
            inputs = {"input_ids": ids, "attention_mask": keep}
        output = model.generate(**inputs, generation_config=settings, record_ids=[p.index for p in batch])
        answers += output.completions
    return answers


def compare_batches(
    config: Config, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """For each arm, how many texts differ from those at the first batch size."""
    prompts = read_prompts(config, tokenizer, config.num_prompts)
    first, *others = config.batch_size or [1, 3, 8]
    rows = []
    for name in config.arms or COMPARED:
        settings = settings_of(name, config)
        expected = answers_by(model, prompts, settings, first, None)
        row: dict[str, Any] = {"arm": name, "texts": len(prompts)}
        for batch_size in others:
            for side in (None, "left", "right"):
                answers = answers_by(model, prompts, settings, batch_size, side)
                num = sum(a != b for a, b in zip(answers, expected, strict=True))
                row[f"{batch_size} {side or 'lists'}"] = num
        rows.append(row)
    print_table(rows)
    return rows


def random_model(config: Config, shape: Shape) -> LLaDAModelLM:
    """A model of random weights, made on the device in its own precision."""
    fields = shape.model
    if isinstance(fields, str):
        fields = read_yaml(ROOT / f"configs/models/{fields}.yaml")
    last = shape.vocab_size - 1
    model_config = LLaDAConfig(
        **fields, vocab_size=shape.vocab_size, embedding_size=shape.vocab_size, mask_token_id=last,
        eos_token_id=last - 1, pad_token_id=last - 1,
    )  # fmt: skip
    with torch.device(config.device), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return LLaDAModelLM._from_config(model_config, dtype=DTYPES[shape.dtype]).eval()


def time_shape(config: Config) -> list[dict[str, Any]]:
    """The table of times and floors of a model of random weights."""
    shape = SHAPES[config.shape]
    model = random_model(config, shape)
    calls, rows = Calls(model), []
    for num_prompt, gen_length in shape.lengths:
        for batch_size in config.batch_size or [1]:
            rows += time_lengths(config, model, calls, num_prompt, gen_length, batch_size)
    print_table(rows)
    return rows


def time_lengths(
    config: Config, model: LLaDAModelLM, calls: Calls, num_prompt: int, gen_length: int, batch_size: int
) -> list[dict[str, Any]]:
    """The rows of the table for one (P, G); the arms take turns."""
    source = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(model.config.eos_token_id, (batch_size, num_prompt), generator=source).tolist()
    prompts = [Prompt(i, prompt, {}) for i, prompt in enumerate(ids)]
    width = min(config.block_length, gen_length)
    wanted = config.arms or ["reference", "exact", "dual"]
    pairs = [(arm, k) for arm in wanted for k in config.tokens_per_step if arm != "reference" or k == 1]
    arms, settings, results = {}, {}, {pair: Result() for pair in pairs}
    for arm, k in pairs:
        settings[arm, k] = settings_of(
            "exact" if arm == "reference" else arm, config, gen_length=gen_length, block_length=width,
            steps=gen_length // k, early_stop=False,
        )  # fmt: skip
        arms[arm, k] = our_arm(model, settings[arm, k])
        if arm == "reference":
            arms[arm, k] = canvas_arm(model, reference_sampler(model, settings[arm, k]))
        arms[arm, k](prompts)  # warms up
    for _ in range(config.repeats):
        for pair in pairs:
            time_arm(arms[pair], [prompts], results[pair], calls, model.device)
    rows, num_tokens = [], batch_size * gen_length
    for (arm, k), result in results.items():
        seconds = statistics.median(result.seconds)
        floor = sampler_floor(
            model.config, Gpu(config.peak_tflops, config.bandwidth), settings[arm, k], num_prompt,
            batch_size=batch_size, is_pruned=arm != "reference",
        )  # fmt: skip
        rows.append(
            {
                "P": num_prompt, "G": gen_length, "batch": batch_size, "arm": arm, "tokens/step": k,
                "tokens/s": num_tokens / seconds, "min": num_tokens / max(result.seconds),
                "max": num_tokens / min(result.seconds), "ms/forward": 1000 * seconds / result.num_calls,
                "peak MiB": result.memory, "floor tokens/s": num_tokens / floor,
                "% of floor": 100 * floor / seconds,
            }
        )  # fmt: skip
    return rows


def check(config: Config) -> None:
    """ValueError for flags that do not go together."""
    if config.repeats < 1 or config.num_prompts < 1 or any(n < 1 for n in config.batch_size):
        raise ValueError("--repeats, --num_prompts and --batch_size must be at least 1")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no GPU here; use --device cpu")
    if config.shape is None and (config.model_name_or_path is None or config.prompts_file is None):
        raise ValueError("give --model_name_or_path and --prompts_file, or --shape")
    for arm in config.arms:
        if arm != "reference":
            settings_of(arm, config)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables; status 1 if an exact text differs from the reference's."""
    config = parse(Config, argv, description=__doc__)
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    is_cuda = config.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if is_cuda else f"{platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    if config.shape is not None:
        rows = time_shape(config)
    else:
        tokenizer = load_tokenizer(config.model_name_or_path, chat=config.is_instruct)
        model = load_model(config.model_name_or_path, dtype=config.dtype, device=config.device).eval()
        model.config.eot_token_id = special_ids(model.config, tokenizer).eot
        if config.context is not None:
            model.config.max_sequence_length = config.context
        mode = compare_batches if config.invariance else time_on_prompts
        rows = mode(config, model, tokenizer)
    if config.output is not None:
        report = {"config": asdict(config), "machine": machine, "torch": torch.__version__, "rows": rows}
        Path(config.output).write_text(json.dumps(report, indent=1))
    failed = [row for row in rows if not is_as_promised(row, config)]
    if failed:
        print(f"FAILED: {len(failed)} arms differ where they must not: {failed}", flush=True)
        raise SystemExit(1)


def is_as_promised(row: dict[str, Any], config: Config) -> bool:
    """Whether exact texts are the reference's, and batches change nothing."""
    if config.invariance:
        return not any(value for name, value in row.items() if name not in ("arm", "texts"))
    if row["arm"] != "exact" or "equal texts" not in row:
        return True
    num_equal, _, num = row["equal texts"].partition("/")
    return num_equal == num


if __name__ == "__main__":
    main()
