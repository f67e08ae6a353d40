"""The ranks of an evaluation: each holds the model and computes its share of the requests.

Rank 0 alone speaks with lm_eval, so prompts and scores are those of a single process; the others wait in
`serve` for their shares. A request's masks and samples are keyed by what it asks, so neither the number of
ranks nor the batch size changes more than rounding. Every finished request is on disk at once.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from tqdm import tqdm

from llada.data.final_answer import opens_thought, without_thoughts
from llada.diffusion.likelihood import Request, iter_greedy, iter_scores
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from llada.inference.eval_args import ModelArgs
from llada.models.checkpoints import describe_checkpoint, load_model
from llada.models.tokens import load_tokenizer, special_ids
from llada.resumable import ResumableJob
from llada.run import start_run
from modelling_final import LLaDAGenerationConfig

log = logging.getLogger("lm_eval.llada")
# A rank may wait hours for the slowest one; the default timeout of a process group is half an hour.
PATIENCE = timedelta(days=7)
# Arguments that do not change a result: a run may continue with others.
NO_EFFECT = ("batch_size", "generate_batch_size", "device", "record_dir", "mask_id", "cuda_graphs")


class Generation(NamedTuple):
    """A prompt to answer. The settings' canvas may be longer than the answer, to hold whole blocks."""

    text: str
    token_ids: tuple[int, ...]
    until: tuple[str, ...]  # stop strings
    length: int  # tokens of the answer
    settings: dict[str, Any]  # of the sampler
    suffix_ids: tuple[int, ...] = ()  # behind the answer, which then fills a hole


class EvalRank:
    """One rank: a model, its tokenizer, and the log of finished requests."""

    def __init__(self, args: ModelArgs) -> None:
        self.args = args
        masks = MaskSettings(
            args.num_masks,
            args.mask_plan,
            exact_tokens=args.exact_tokens,
            reference_batch=min(args.reference_batch, args.num_masks),
        )
        self._likelihood = LikelihoodSettings(
            args.likelihood, masks, args.seed, args.batch_size, args.cfg_scale
        )
        self.run = start_run(args.device)
        # Requests and results travel on the CPU, whatever the device of the model.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.run.world_size > 1 else None
        self.tokenizer = load_tokenizer(args.model_path, mask_token_id=args.mask_id)
        self.model = load_model(
            args.model_path,
            dtype=args.dtype,
            adapter_path=args.adapter_path,
            attn_implementation=args.attn_implementation,
            device=self.run.device,
            mask_token_id=args.mask_id,
        ).eval()
        self.ids = special_ids(self.model.config, self.tokenizer)
        settings = {k: value for k, value in dataclasses.asdict(args).items() if k not in NO_EFFECT}
        settings["checkpoint"] = describe_checkpoint(args.model_path, args.adapter_path)
        # a folder for each setting: an evaluation of several tasks may write into one --output_path
        folder = args.record_dir and Path(args.record_dir, ResumableJob.key(settings)[:8])
        self.log = ResumableJob(folder, settings, rank=self.run.rank)

    def serve(self) -> None:
        """Ranks other than 0: compute shares until rank 0 calls `dismiss`."""
        while (work := self._broadcast(None)) is not None:
            self._share(*work)

    def dismiss(self) -> None:
        """Rank 0: no more work."""
        if self._group is not None:
            self._broadcast(None)

    def compute(self, kind: str, items: dict[str, Any]) -> list[Any]:
        """Rank 0: the results of all items, in their order; those in the log are not computed again.

        Args:
            kind: "likelihood" or "greedy" (items are `Request`s), or "answer" (`Generation`s).
            items: by key of the log.
        """
        todo = {key: item for key, item in items.items() if key not in self.log}
        if len(todo) < len(items) and self.log.folder is not None:
            log.info(
                "%d of %d requests are already in %s", len(items) - len(todo), len(items), self.log.folder
            )
        if todo:
            if self._group is not None:
                self._broadcast((kind, todo))
            self._share(kind, todo)
        return [self.log[key] for key in items]

    def _broadcast(self, work: tuple[str, dict[str, Any]] | None) -> tuple[str, dict[str, Any]] | None:
        box = [work]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _share(self, kind: str, items: dict[str, Any]) -> None:
        """Computes this rank's part of the items; rank 0 then has the results of all in its log."""
        rank, world_size = self.run.rank, self.run.world_size
        own = _deal(items, world_size)[rank]
        run = {"likelihood": self._scores, "greedy": self._greedy, "answer": self._answers}[kind]
        bar = tqdm(run(own), desc=kind, unit="req", total=len(own), disable=rank != 0, mininterval=1)
        results = {}
        for key, result, details in bar:
            self.log.put(key, result, **details)
            results[key] = result
        if self._group is not None:  # the others forget: rank 0 alone answers lm_eval
            parts = [None] * world_size if rank == 0 else None
            dist.gather_object(results, parts, group=self._group)
            for part in parts or []:
                self.log.learn(part)

    def _scores(self, items: dict[str, Request]) -> Iterator[tuple[str, list[float | None], dict[str, Any]]]:
        keys = list(items)
        for index, score in iter_scores(self.model, list(items.values()), self._likelihood):
            error = None if math.isnan(score.standard_error) else score.standard_error
            details = {
                "answer": self.tokenizer.decode(items[keys[index]].answer),
                "num_forwards": score.num_forwards,
            }
            yield keys[index], [score.log_likelihood, error], details

    def _greedy(self, items: dict[str, Request]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
        keys = list(items)
        found = iter_greedy(self.model, list(items.values()), self._likelihood)
        return ((keys[index], is_greedy, {}) for index, is_greedy in found)

    def _answers(self, items: dict[str, Generation]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        size = self.args.generate_batch_size or self.args.batch_size or 8
        groups: dict[str, list[str]] = {}
        for key, prompt in items.items():
            groups.setdefault(json.dumps(prompt.settings, sort_keys=True), []).append(key)
        for keys in groups.values():
            # longest first: a batch too large for the memory fails at once, not after hours
            keys.sort(key=lambda key: -len(items[key].token_ids))
            for start in range(0, len(keys), size):
                yield from self._generate({key: items[key] for key in keys[start : start + size]})

    def sampler(self, settings: dict[str, Any]) -> LLaDAGenerationConfig:
        """The sampler of prompts with these settings. ValueError for settings that exclude each other."""
        known = LLaDAGenerationConfig().to_dict()
        own = {name: getattr(self.args, name) for name in known if hasattr(self.args, name)}
        return LLaDAGenerationConfig(**own | settings)

    def _generate(self, batch: dict[str, Generation]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        settings = next(iter(batch.values())).settings
        suffixes = [prompt.suffix_ids for prompt in batch.values()]
        output = self.model.generate(
            [list(prompt.token_ids) for prompt in batch.values()],
            generation_config=self.sampler(settings),
            return_dict_in_generate=True,
            # The key names the request, so its draws are the same in any batch and on any rank; 60 bits of
            # it fit an int64.
            record_ids=[int(key[:15], 16) for key in batch],
            **({"suffixes": suffixes} if any(suffixes) else {}),
        )
        length = settings["gen_length"]
        answers = output.sequences[:, -length - max(map(len, suffixes)) :][:, :length].tolist()
        for (key, prompt), canvas in zip(batch.items(), answers, strict=True):
            token_ids = canvas[: prompt.length]
            end = next((i for i, token in enumerate(token_ids) if token in self.ids.ends), len(token_ids))
            text = self.tokenizer.decode(token_ids[:end], skip_special_tokens=True)
            raw = self.tokenizer.decode(canvas)
            answer = cut_answer(text, prompt.until, starts_inside=opens_thought(prompt.text))
            yield key, answer, {"prompt": prompt.text, "raw": raw, "num_tokens": end}


def _deal(items: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """The items of each rank: equal contexts, which share forwards, together, and lengths about even."""
    hands: list[dict[str, Any]] = [{} for _ in range(world_size)]
    groups: dict[tuple[int, ...], list[str]] = {}
    for key, item in items.items():
        groups.setdefault(item.context if isinstance(item, Request) else (len(groups),), []).append(key)
    for n, keys in enumerate(sorted(groups.values(), key=lambda keys: -_length(items[keys[0]]))):
        hands[n % world_size].update((key, items[key]) for key in keys)
    return hands


def _length(item: Request | Generation) -> int:
    return len(item.context) + len(item.answer) if isinstance(item, Request) else len(item.token_ids)


def cut_answer(text: str, until: Sequence[str], *, starts_inside: bool = False) -> str:
    """The text behind the model's thoughts, up to the first of the stop strings."""
    text = without_thoughts(text, starts_inside=starts_inside)
    for stop in filter(None, until):
        text = text.partition(stop)[0]
    return text
