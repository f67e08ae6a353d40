"""Makes preference data from a checkpoint's own answers: sample several to each prompt, score, compare.

Prompts are records with a `prompt` (or `messages`, `question`, ...) and the fields that --reward_funcs need.
A completion without a reward (a judge that failed) is left out. With --is_instruct prompts and completions
are lists of messages, else texts.

Writes to --output_dir, in the order of the prompts:
    paired.jsonl    {"id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected"}, for train_dpo.py
    unpaired.jsonl  {"id", "prompt", "completion", "label", "score"}, for train_elbo_kto.py
    results.json    counts, and the mean of every reward

Under torchrun the processes share the prompts. The same command after a kill continues; with another
--desirable_from or --pairs_per_prompt it only compares anew.

Run:
    python rlhf/make_preferences.py --model_name_or_path runs/quickstart/sft --is_instruct \\
        --prompts_file runs/quickstart/data/prompts.jsonl --output_dir runs/quickstart/preferences \\
        --gen_length 32 --num_generations 8
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada.data.flags import QuestionFlags, SpellingFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.inference.sampler_flags import ModelFlags, SamplerFlags, sampler_settings
from llada.rewards.flags import RewardFlags


@dataclass(kw_only=True)
class Config(QuestionFlags, SpellingFlags, ModelFlags, SamplerFlags, RewardFlags):
    """Preferences."""

    prompts_file: str = flag(help="Records with prompts and what the rewards need.", reads="path")
    output_dir: str = flag(help="Folder for the two files.", writes="folder")
    is_instruct: bool = flag(False, "Use the chat template.")
    max_samples: int | None = flag(None, "Only the first so many prompts of the file.", at_least=1)
    long_prompts: str = flag("error", "Prompts that leave no room for the answer.", choices=["error", "drop"])
    num_generations: int = flag(8, "Completions per prompt.", at_least=2)
    temperature: float = flag(1.0, "Of the sampler; 0 would give the same completion every time.", above=0)
    pairs_per_prompt: int = flag(
        1, "Pairs of each prompt at most; no completion is in two of them.", at_least=1
    )
    min_margin: float = flag(0.0, "Scores of a pair differ by more than this.", at_least=0)
    desirable_from: float = flag(0.5, "Unpaired completions are desirable from this score on.")
    batch_size: int = flag(8, "Prompts answered together.", at_least=1)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from tqdm import tqdm

from llada.data.prompts import Prompt, read_prompts
from llada.data.reading import describe_losses
from llada.diffusion.masking import generator
from llada.models.building import load_for_inference
from llada.models.checkpoints import describe_checkpoint
from llada.policies.completions import Completion, Sampler, as_messages
from llada.resumable import ResumableJob, write_atomically
from llada.rewards.scoring import sums_of_rewards
from llada.run import barrier, end_run, means_over_ranks, start_run

# Flags that change neither a completion nor its score.
FREE = (
    *("model_name_or_path", "adapter_path"),  # their contents count, not their names
    *("prompts_file", "output_dir", "max_samples", "batch_size", "device"),
    *("pairs_per_prompt", "min_margin", "desirable_from"),
)


def pairs_of(texts: list[str], scores: list[float | None], config: Config, key: int) -> list[tuple[int, int]]:
    """(chosen, rejected) numbers of completions, each in one pair, best against worst.

    Completions of one score come in random order, keyed by the prompt; equal texts count once.
    """
    order = generator(config.seed, "pairs", key).permutation(len(texts))
    first = {texts[i]: i for i in reversed(order) if scores[i] is not None}
    ranked = sorted((i for i in order if first.get(texts[i]) == i), key=lambda i: -scores[i])
    pairs = [(int(a), int(b)) for a, b in zip(ranked, reversed(ranked), strict=True)]
    pairs = [(a, b) for a, b in pairs if scores[a] - scores[b] > max(0.0, config.min_margin)]
    return pairs[: config.pairs_per_prompt]


def paired_records(prompt: Prompt, result: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """The lines of paired.jsonl about one prompt."""
    texts, scores = result["completions"], result["scores"]
    for place, (chosen, rejected) in enumerate(pairs_of(texts, scores, config, prompt.index)):
        yield {
            "id": f"{prompt.name}-{place}",
            "prompt": prompt.prompt,
            "chosen": as_messages(texts[chosen], chat=config.is_instruct),
            "rejected": as_messages(texts[rejected], chat=config.is_instruct),
            "score_chosen": scores[chosen],
            "score_rejected": scores[rejected],
        }


def unpaired_records(prompt: Prompt, result: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """The lines of unpaired.jsonl about one prompt; equal completions once."""
    distinct = dict(zip(result["completions"], result["scores"], strict=True))
    for place, (text, score) in enumerate(distinct.items()):
        if score is not None:
            yield {
                "id": f"{prompt.name}-{place}",
                "prompt": prompt.prompt,
                "completion": as_messages(text, chat=config.is_instruct),
                "label": score >= config.desirable_from,
                "score": score,
            }


def result_of(completions: list[Completion]) -> dict[str, Any]:
    """What is kept of the completions of a prompt."""
    names = completions[0].rewards
    return {
        "completions": [completion.text for completion in completions],
        "scores": [completion.reward for completion in completions],
        "rewards": {name: [completion.rewards[name] for completion in completions] for name in names},
    }


def key_of(prompt: Prompt) -> str:
    """The name of a prompt's result; the record's fields decide its scores."""
    return ResumableJob.key(prompt.index, prompt.token_ids, prompt.record)


def write(config: Config, prompts: list[Prompt], log: ResumableJob, own: dict[str, float]) -> dict[str, Any]:
    """Writes the three files, and gives what results.json holds; `own`: what rewards log of themselves."""
    folder = Path(config.output_dir)
    results = [(prompt, log[key_of(prompt)]) for prompt in prompts]
    lines = {
        "paired.jsonl": [line for p, r in results for line in paired_records(p, r, config)],
        "unpaired.jsonl": [line for p, r in results for line in unpaired_records(p, r, config)],
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(folder / name, text)
    known: dict[str, list[float]] = {}
    for _, result in results:
        for name, scores in result["rewards"].items():
            known.setdefault(f"rewards/{name}/mean", []).extend(v for v in scores if v is not None)
    total = [score for _, result in results for score in result["scores"]]
    summary = {
        "prompts": len(prompts),
        "completions": len(total),
        "completions_without_score": sum(score is None for score in total),
        "pairs": len(lines["paired.jsonl"]),
        "desirable": sum(record["label"] for record in lines["unpaired.jsonl"]),
        "undesirable": sum(not record["label"] for record in lines["unpaired.jsonl"]),
        **{name: sum(v) / len(v) if v else None for name, v in known.items()},
        **own,
    }
    write_atomically(folder / "results.json", json.dumps(summary, indent=1))
    return summary


def main(argv: list[str] | None = None) -> None:
    """Makes the preference data."""
    config = parse(Config, argv, description=__doc__)
    rewards = config.load_rewards()
    run = start_run(config.device)
    model, tokenizer = load_for_inference(**config.to_load(), chat=config.is_instruct, device=run.device)
    prompts, counts = read_prompts(
        config.prompts_file,
        tokenizer,
        chat=config.is_instruct,
        context=model.config.max_sequence_length,
        gen_length=config.gen_length,
        long=config.long_prompts,
        limit=config.max_samples,
        reader=config.reader(),
        parse_special=config.parse_special_tokens,
    )
    config.check_records(prompts)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["checkpoint"] = describe_checkpoint(config.model_name_or_path, config.adapter_path)
    parts = Path(config.output_dir, "parts")
    log = ResumableJob(parts, settings, rank=run.rank, world_size=run.world_size)
    mine = [prompts[n] for n in log.share([key_of(prompt) for prompt in prompts])]
    mine.sort(key=lambda prompt: len(prompt.token_ids))
    num, settings = config.num_generations, sampler_settings(config)
    sampler = Sampler(model, tokenizer, rewards, settings, config.batch_size * num, chat=config.is_instruct)
    starts = range(0, len(mine), config.batch_size)
    for start in tqdm(starts, desc="preferences", disable=not run.is_main):
        batch = mine[start : start + config.batch_size]
        completions = sampler.answer(batch, seed=config.seed, num_generations=num)
        for i, prompt in enumerate(batch):
            log.put(key_of(prompt), result_of(completions[i * num : (i + 1) * num]))
    own = means_over_ranks(sums_of_rewards(rewards))
    barrier()
    if run.is_main:
        log.read()
        summary = write(config, prompts, log, own)
        for what, count in summary.items():
            print(f"{what}: {count}", flush=True)
        print(describe_losses(counts, len(prompts) + counts.total()).strip("\n"), flush=True)
    end_run()


if __name__ == "__main__":
    run_main(main)
