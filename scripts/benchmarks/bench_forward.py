"""Times single forwards of the sampler and the peak memory of drawing tokens, beside an older checkout.

    dual       a window of --block_length rows against a filled cache (--cache dual)
    full       --rows rows without a cache, logits of all of them
    likelihood 4 answers of 24 tokens after 60, --num_masks masks each; ours beside the published program,
               which runs batches of 32 and forms all logits
    packed     documents of 1/8 to 1 of --packed_length tokens in one row, attention inside each, beside the
               same in padded rows
    draw       tokens and confidences of --draw_rows rows at vocabulary --draw_vocab: seconds, and the peak of
               memory above the logits in multiples of them

With --against FOLDER the model of another checkout of this repository, with the same weights, takes turns
with ours; the ratio and the largest difference of the logits are printed. Seconds are CPU seconds of this
thread on a CPU, which other programs on the machine disturb least.

Run:
    git worktree add ../before HEAD~10
    python scripts/benchmarks/bench_forward.py --against ../before
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main

WHAT = ("dual", "full", "likelihood", "packed", "draw")


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    config_name: str = flag("1m", help="Size of the model, as for pretraining.", reads="size")
    vocab_size: int = flag(320, help="Its vocabulary.", at_least=1)
    what: list[str] = flag(list(WHAT), help="What to time.", choices=WHAT)
    against: str | None = flag(None, help="Another checkout of this repository.")
    prompt_length: int = flag(96, help="dual: tokens before the block.", at_least=1)
    block_length: int = flag(32, help="dual: rows of the window.", at_least=1)
    rows: int = flag(128, help="full: rows.", at_least=1)
    num_masks: int = flag(128, help="likelihood: masks of an answer, a multiple of 32.", at_least=32)
    packed_length: int = flag(256, help="packed: tokens of the longest document.", at_least=8)
    draw_rows: int = flag(64, help="draw: rows.", at_least=1)
    draw_vocab: int = flag(126_464, help="draw: vocabulary.", at_least=1)
    repeats: int = flag(100, help="Turns of each arm.", at_least=1)
    threads: int = flag(1, help="CPU threads.", at_least=1)
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag("float32", help="Of the weights.", choices=["float32", "bfloat16"])


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch

import modelling_final
from llada.diffusion.likelihood import Request, score_answers
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from llada.flags.yaml_files import read_yaml
from llada.models.building import ROOT

Run = Callable[[], torch.Tensor]


def load_package(folder: str) -> ModuleType:
    """The `modelling_final` of another checkout, under a name of its own."""
    path = Path(folder, "modelling_final", "__init__.py")
    if not path.is_file():
        raise ValueError(f"--against {folder}: there is no modelling_final/__init__.py")
    spec = importlib.util.spec_from_file_location(
        "model_before", path, submodule_search_locations=[str(path.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_before"] = module
    spec.loader.exec_module(module)
    return module


def make_model(package: ModuleType, config: Config) -> torch.nn.Module:
    """A model of random weights, the same for every package."""
    last = config.vocab_size - 1
    fields = read_yaml(ROOT / f"configs/models/{config.config_name}.yaml")
    sizes = {"vocab_size": config.vocab_size, "embedding_size": config.vocab_size}
    ids = {"mask_token_id": last, "eos_token_id": last - 1, "pad_token_id": last - 1}
    torch.manual_seed(0)
    model = package.LLaDAModelLM._from_config(package.LLaDAConfig(**fields, **sizes, **ids))
    return model.eval().to(config.device, getattr(torch, config.dtype))


def forwards(package: ModuleType, config: Config) -> dict[str, Run]:
    """name -> one forward."""
    model = make_model(package, config)
    run = lambda **inputs: model(**inputs).logits  # noqa: E731
    if importlib.util.find_spec(f"{package.__name__}.lean_llada") is not None:  # what the sampler runs
        run = importlib.import_module(f"{package.__name__}.lean_llada").LeanForward(model, 8192)
    start, end = config.prompt_length, config.prompt_length + config.block_length
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size - 2, (8, end + config.block_length), generator=random).to(
        config.device
    )
    cache = package.WindowCache(model.config)
    with torch.no_grad():
        model(ids[:1], past_key_values=cache)
    cache.window = (start, end)
    window = {
        "input_ids": ids[:1, start:end],
        "past_key_values": cache,
        "position_ids": torch.arange(start, end, device=config.device)[None],
        "query_positions": torch.arange(end - start, device=config.device)[None],
    }
    full = ids.flatten()[: config.rows][None]
    return {"dual": lambda: run(**window), "full": lambda: run(input_ids=full)}


def likelihoods(config: Config) -> dict[str, Run]:
    """name -> the likelihoods of four answers."""
    model = make_model(modelling_final, config)
    ids = torch.randint(0, config.vocab_size - 2, (4, 84), generator=torch.Generator().manual_seed(3))
    requests = [Request(tuple(row[:60]), tuple(row[60:]), str(n)) for n, row in enumerate(ids.tolist())]
    settings = LikelihoodSettings(masks=MaskSettings(config.num_masks, exact_tokens=0))
    mask_id = model.config.mask_token_id

    def published(row: torch.Tensor) -> float:
        """get_log_likelihood.py of LLaDA: masks of one answer, 32 at a time."""
        losses = []
        for _ in range(config.num_masks // 32):
            k = int(torch.randint(1, 25, ()))
            sizes = ((torch.linspace(k, k + 31 * 24 / 32, steps=32).round().long() - 1) % 24) + 1
            is_masked = torch.rand(32, 24).argsort(dim=1).argsort(dim=1) < sizes[:, None]
            is_masked = torch.nn.functional.pad(is_masked, (60, 0)).to(config.device)
            tokens = row.to(config.device).expand(32, -1)
            logits = model(torch.where(is_masked, mask_id, tokens)).logits
            nll = torch.nn.functional.cross_entropy(logits[is_masked], tokens[is_masked], reduction="none")
            weights = (24 / sizes)[:, None].expand(-1, 84).to(config.device)[is_masked]
            losses.append(float((nll * weights).sum() / 32))
        return -sum(losses) / len(losses)

    return {
        "ours": lambda: torch.tensor([s.log_likelihood for s in score_answers(model, requests, settings)]),
        "published": lambda: torch.tensor([published(row) for row in ids]),
    }


def packed(config: Config) -> dict[str, Run]:
    """name -> the last hidden states of eight documents, in one row or a row each."""
    model = make_model(modelling_final, config).model
    lengths = [config.packed_length * n // 8 for n in (8, 1, 5, 3, 6, 2, 4, 7)]
    ids = torch.randint(0, config.vocab_size - 2, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    parts = ids.split(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(config.device)
    row, rows = ids[None].to(config.device), torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    padded = {"input_ids": rows.to(config.device), "attention_mask": mask.to(config.device)}
    keep = mask.to(config.device)
    return {
        "ours": lambda: model(input_ids=row, document_borders=borders).last_hidden_state[0],
        "padded": lambda: model(**padded).last_hidden_state[keep],
    }


def drawing(package: ModuleType, config: Config) -> Run:
    """Tokens of many rows at temperature 1, and their scores under the published order."""
    remasking = importlib.import_module(f"{package.__name__}.remasking_llada")
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(1, config.draw_rows, config.draw_vocab, generator=random).to(config.device)
    draws = torch.rand(1, config.draw_rows, generator=random, dtype=torch.float64).to(config.device)

    def draw() -> torch.Tensor:
        tokens = remasking.choose_tokens(logits, draws, temperature=1.0, mask_id=config.draw_vocab - 1)
        if hasattr(remasking, "confidence"):  # before orders had a table
            return tokens, remasking.confidence(logits, tokens, None)
        orders = importlib.import_module(f"{package.__name__}.orders_llada")
        return tokens, remasking.order_scores(orders.low_confidence, logits, tokens, None)

    return lambda: draw()[0]


def peak_bytes(run: Run, device: str) -> int:
    """The peak of memory above what is in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    in_use = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def take_turns(arms: dict[str, Run], repeats: int, device: str, runs: int = 1) -> dict[str, list[float]]:
    """Seconds of a run of each arm, turn by turn; a turn is `runs` of them."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    clock = time.perf_counter if device.startswith("cuda") else time.thread_time
    for turn in range(-3, repeats):
        for name, run in arms.items():
            started = clock()
            for _ in range(runs):
                run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn >= 0:  # the first turns warm up
                seconds[name].append((clock() - started) / runs)
    return seconds


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Prints a line for each kind of work."""
    config = parse(Config, argv, description=__doc__)
    torch.set_num_threads(config.threads)
    packages: dict[str, Any] = {"ours": modelling_final}
    if config.against is not None:
        packages["before"] = load_package(config.against)
    for what in config.what:
        if what == "likelihood":
            arms = likelihoods(config)
        elif what == "packed":
            arms = packed(config)
        elif what == "draw":
            arms = {name: drawing(package, config) for name, package in packages.items()}
        else:
            arms = {name: forwards(package, config)[what] for name, package in packages.items()}
        # a sampler's forwards follow one another: the other arm's weights are not in the cache between them
        repeats, runs = (config.repeats, 10) if what in ("dual", "full") else (5, 1)
        seconds = take_turns(arms, repeats, config.device, runs)
        line = ", ".join(f"{name} {1e3 * statistics.median(s):.3f} ms" for name, s in seconds.items())
        for name in arms.keys() - {"ours"}:
            pairs = zip(seconds[name], seconds["ours"], strict=True)
            line += f", {statistics.median(other / ours for other, ours in pairs):.2f}x"
        if arms.keys() & {"before", "padded"}:
            line += f", difference {float((arms['ours']() - list(arms.values())[1]()).abs().max()):.1e}"
        if what == "draw":
            size = 4 * config.draw_rows * config.draw_vocab
            peaks = (f"{name} {peak_bytes(run, config.device) / size:.2f}" for name, run in arms.items())
            line += f"; memory above the logits, in logits: {', '.join(peaks)}"
        print(f"{what}: {line}", flush=True)


if __name__ == "__main__":
    run_main(main)
