"""Answer prompts with an autoregressive model (the verifier), faster with the drafts of a LLaDA model.

The answers are the verifier's own: exactly its distribution when sampling, its greedy output at temperature
0. Every prompt is decoded twice, with drafts and plainly, and the report compares speed and (at temperature
0, and with --acceptance match) the tokens; --no_compare leaves plain decoding out. Prompts as for
generate.py; where the two tokenizers differ, --bridge says how. The same command continues a killed run.
More: docs/speculative.md.

Run:
    python inference/speculative_decode.py --drafter runs/alignment --verifier runs/teacher/final \\
        --is_instruct --prompt "What is 3 + 4?" --draft_length 8
    python inference/speculative_decode.py --drafter runs/alignment --verifier checkpoints/SmolLM2-135M \\
        --is_instruct --bridge vocabulary --temperature 0.8 \\
        --prompts_file data/samples/prompts.jsonl --output_path runs/speculative.jsonl
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llada.data.flags import PromptFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.inference.sampler_flags import ModelFlags
from llada.speculative.settings import SpeculativeSettings


@dataclass(kw_only=True)
class Config(PromptFlags, ModelFlags, SpeculativeSettings):
    """Speculative decoding; the model is the drafter."""

    model_name_or_path: str = flag(
        help="The drafter: LLaDA checkpoint or run folder, LoRA adapter folder, hub name, or a folder of "
        "export_checkpoint.py --format pard.",
    )
    verifier: str = flag(help="Folder or hub name of the autoregressive model that decides.", reads="model")
    verifier_gguf_file: str | None = flag(None, "Name of a GGUF file in the verifier's folder.")
    dtype: str = flag("auto", "Of both models; auto: as saved, float32 from a GGUF.")
    bridge: str = flag(
        "none",
        "none: both have one vocabulary. vocabulary: drafts of tokens that both have. text: drafted text is "
        "tokenised again (accepted by match only).",
        choices=["none", "vocabulary", "text"],
    )
    report_path: str | None = flag(None, "JSON file that receives the report.", writes="file")
    compare: bool = flag(True, "Decode plainly, too, and compare.")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.causal_lm import describe_causal_lm, load_causal_lm, prompt_ids
from llada.data.prompts import Prompt, read_asked_prompts
from llada.models.checkpoints import describe_checkpoint
from llada.models.tokens import end_ids
from llada.resumable import ResumableJob, write_atomically
from llada.run import barrier, end_run, start_run
from llada.speculative.bridge import Bridge
from llada.speculative.decoder import SpeculativeDecoder, SpeculativeStats, ends_with
from llada.speculative.pard import load_drafter

# Flags that change neither an answer nor which prompts have one: a killed run may go on with others.
FREE = (
    *("model_name_or_path", "adapter_path", "verifier"),  # their contents count, not their names
    *("prompt", "prompts_file", "output_path", "report_path", "max_samples", "device"),
)


@dataclass(frozen=True)
class Item(Prompt):
    """A prompt in both models' tokens; `token_ids` are the drafter's."""

    verifier_ids: list[int] = field(default_factory=list)


def read_items(config: Config, pair: "DrafterAndVerifier") -> Iterator[Item]:
    """The prompts in both models' tokens; ValueError names file and line, also of one without room."""
    prompts = read_asked_prompts(config, pair.drafter_tokenizer)
    for prompt in prompts:
        asked = prompt.prompt
        if config.is_instruct and isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        item = Item(**vars(prompt), verifier_ids=prompt_ids(asked, pair.verifier_tokenizer))
        try:
            pair.decoder.check_lengths(len(item.verifier_ids), len(item.token_ids), config.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from error
        yield item


def answer(decoder: SpeculativeDecoder, item: Item, ends: Sequence[int], *, compare: bool) -> dict[str, Any]:
    """What there is to note of a prompt's two answers."""
    done = {"record_id": item.index, "is_done": ends_with(ends)}
    seconds = {}
    found: dict[str, tuple[list[int], SpeculativeStats]] = {}
    kinds = ["speculative", "plain"] if compare else ["speculative"]
    for kind in kinds if item.index % 2 == 0 else kinds[::-1]:  # neither profits from coming second
        started = time.perf_counter()
        if kind == "plain":
            found[kind] = decoder.decode_plain(item.verifier_ids, **done)
        else:
            found[kind] = decoder.decode(item.verifier_ids, item.token_ids, **done)
        seconds[kind] = time.perf_counter() - started
    tokens, stats = found["speculative"]
    fields: dict[str, Any] = {
        "token_ids": tokens,
        "acceptance_length": stats.acceptance_length,
        "seconds": seconds["speculative"],
        "statistics": asdict(stats),
    }
    if compare:
        plain = found["plain"][0]
        fields |= {"plain_seconds": seconds["plain"], "plain_tokens": len(plain)}
        # only match gives the very tokens of plain decoding; other rules only its distribution
        if decoder.rule == "match":
            fields |= {"is_equal": tokens == plain}
            if tokens != plain:
                fields["difference"] = decoder.explain_difference(
                    item.verifier_ids, tokens, plain, record_id=item.index
                )
    return fields


def report(config: Config, results: Sequence[dict[str, Any]], rule: str) -> dict[str, Any]:
    """The figures over all prompts."""
    total = SpeculativeStats()
    for result in results:
        total += SpeculativeStats(**result["statistics"])
    seconds = sum(result["seconds"] for result in results)
    figures: dict[str, Any] = {
        "prompts": len(results),
        "tokens": total.tokens,
        "acceptance": rule,
        "acceptance_length": total.acceptance_length,
        "acceptance_by_position": total.acceptance_by_position,
        "drafts_by_position": total.reached,
        "verifier_forwards": total.verifier_forwards,
        "draft_forwards": total.draft_forwards,
        "draft_share_of_time": total.draft_seconds / total.seconds,
        "tokens_per_second": total.tokens / seconds,
    }
    if config.compare:
        plain_seconds = sum(result["plain_seconds"] for result in results)
        plain_rate = sum(result["plain_tokens"] for result in results) / plain_seconds
        figures |= {
            "plain_tokens_per_second": plain_rate,
            "speed_up": figures["tokens_per_second"] / plain_rate,
        }
        if rule == "match":
            differences = [result["difference"] for result in results if not result["is_equal"]]
            ties = sum(difference["is_rounding"] for difference in differences)
            figures |= {"equal": len(results) - len(differences), "ties": ties}
    return figures


def show(figures: dict[str, Any]) -> None:
    """Prints the report."""
    print(
        f"{figures['prompts']} prompts, {figures['tokens']} tokens; acceptance by {figures['acceptance']}\n"
        f"acceptance length: {figures['acceptance_length']:.3f} tokens for each forward of the verifier"
    )
    shares = zip(figures["acceptance_by_position"], figures["drafts_by_position"], strict=True)
    shown = " ".join(f"{k}:{share:.2f}" for k, (share, n) in enumerate(shares, start=1) if n)
    print(f"acceptance by position, given all before it: {shown}")
    print(
        f"forwards: {figures['verifier_forwards']} verifier, {figures['draft_forwards']} drafter "
        f"({figures['draft_share_of_time']:.0%} of the time)"
    )
    rate = f"tokens/s: {figures['tokens_per_second']:.1f} with drafts"
    if "speed_up" in figures:
        rate += f", {figures['plain_tokens_per_second']:.1f} plain: speed-up {figures['speed_up']:.2f}"
    print(rate)
    if "equal" in figures:
        wrong = figures["prompts"] - figures["equal"] - figures["ties"]
        print(
            f"equal to plain decoding: {figures['equal']} of {figures['prompts']}; part at a tie within "
            f"rounding: {figures['ties']}; wrong: {wrong}",
            flush=True,
        )


@dataclass(frozen=True)
class DrafterAndVerifier:
    """The two models at work, and their tokenizers."""

    decoder: SpeculativeDecoder
    bridge: Bridge
    drafter_tokenizer: PreTrainedTokenizerBase
    verifier_tokenizer: PreTrainedTokenizerBase
    ends: list[int]  # the verifier's tokens that end an answer


def load(config: Config, device: torch.device) -> DrafterAndVerifier:
    """Both models; ValueError for what cannot be loaded or does not go together."""
    drafter, drafter_tokenizer = load_drafter(**config.to_load(), chat=config.is_instruct, device=device)
    verifier, verifier_tokenizer = load_causal_lm(
        config.verifier,
        flag="--verifier",
        gguf_file=config.verifier_gguf_file,
        dtype=config.dtype,
        device=device,
    )
    width = verifier.config.get_text_config().vocab_size
    bridge = Bridge(config.bridge, drafter.config, drafter_tokenizer, verifier_tokenizer, num_outputs=width)
    decoder = SpeculativeDecoder(drafter, verifier, bridge, config)
    ends = end_ids(verifier, verifier_tokenizer, bridge.vocabulary.target.closing)
    return DrafterAndVerifier(decoder, bridge, drafter_tokenizer, verifier_tokenizer, ends)


def warm_up(pair: DrafterAndVerifier, item: Item, config: Config) -> None:
    """Decodes a few tokens both ways: what is only slow the first time belongs to neither side."""
    num_tokens = min(8, config.max_new_tokens)
    limits = {"record_id": 0, "max_new_tokens": num_tokens, "is_done": ends_with(pair.ends)}
    pair.decoder.decode_plain(item.verifier_ids, **limits)
    pair.decoder.decode(item.verifier_ids, item.token_ids, **limits)


def main(argv: list[str] | None = None) -> None:
    """Answers the prompts and reports."""
    config = parse(Config, argv, description=__doc__)
    config.check()
    config.rule(config.bridge)
    run = start_run(config.device)
    pair = load(config, run.device)
    items = list(read_items(config, pair))
    if run.is_main and config.bridge != "none":
        vocabulary = pair.bridge.vocabulary
        covered = int(vocabulary.is_mapped.sum())
        print(f"{covered} of the drafter's tokens are also the verifier's ({vocabulary.coverage:.0%})")

    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["drafter"] = describe_checkpoint(config.model_name_or_path, config.adapter_path)
    settings["verifier"] = describe_causal_lm(config.verifier, config.verifier_gguf_file)
    parts = config.output_path and f"{config.output_path}.parts"
    job = ResumableJob(parts, settings, rank=run.rank, world_size=run.world_size)
    keys = [job.key(item.index, item.verifier_ids, item.token_ids) for item in items]
    mine = job.share(keys)
    if mine:
        warm_up(pair, items[mine[0]], config)
    for n in tqdm(mine, desc="answers", unit="prompt", disable=not run.is_main or len(mine) < 2):
        fields = answer(pair.decoder, items[n], pair.ends, compare=config.compare)
        kept = [i for i in fields.pop("token_ids") if i not in pair.ends]
        text = pair.verifier_tokenizer.decode(kept, skip_special_tokens=True)
        job.put(keys[n], {"completion": text, **fields})
    barrier()
    if run.is_main:
        job.read()
        finish(config, items, [job[key] for key in keys], pair.decoder.rule)
        if parts is not None:
            shutil.rmtree(parts)
    end_run()


def finish(config: Config, items: list[Item], results: list[dict[str, Any]], rule: str) -> None:
    """Writes and prints answers and report."""
    figures = report(config, results, rule)
    if config.output_path is None:
        print(results[0]["completion"])
    else:
        lines = ({"id": i.name, "prompt": i.shown, **r} for i, r in zip(items, results, strict=True))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(Path(config.output_path), text)
        print(f"{len(items)} answers -> {config.output_path}", flush=True)
    show(figures)
    if config.report_path is not None:
        write_atomically(Path(config.report_path), json.dumps(figures, indent=2) + "\n")
    wrong = figures["prompts"] - figures.get("equal", len(items)) - figures.get("ties", 0)
    assert wrong <= 0, f"{wrong} answers differ from plain decoding by more than rounding; please report this"


if __name__ == "__main__":
    run_main(main)
