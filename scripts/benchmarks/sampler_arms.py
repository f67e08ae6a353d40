"""Samplers under one interface: what an arm of the benchmark is, and the settings its name stands for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llada.data.prompts import Prompt
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM
from reference_sampler import Sampler

# Parts of an arm's name -> settings; "dual+factor" has those of both. Some take a number: factor0.5.
PARTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "nostop": {"early_stop": False},
    "origin": {"method": "semi_autoregressive_origin"},
    "random": {"remasking": "random"},
    "sampled": {"temperature": 1.0},
    "guided": {"cfg_scale": 0.5},
    "graphs": {"cuda_graphs": True},
    "penalised": {"repetition_penalty": 1.2},
    "remdm": {"remdm": "cap", "temperature": 1.0},
    **{rule: {"parallel_decoding": rule} for rule in ("factor", "threshold", "entropy", "klass")},
    **{cache: {"cache": cache} for cache in ("dual", "prefix")},
}
NUMBERS = {"factor": "factor", "threshold": "threshold", "entropy": "entropy_bound"}


@dataclass
class Answers:
    """What an arm made of a batch."""

    tokens: list[list[int]]  # each answer before its first EOS or EoT
    num_decided: int


Arm = Callable[[list[Prompt]], Answers]


def settings_of(arm: str, **values: Any) -> LLaDAGenerationConfig:
    """The settings that an arm's name stands for, on top of `values`.

    Raises:
        ValueError: an unknown part of the name.
    """
    values = {"method": "semi_autoregressive_padding", **values}
    for part in arm.split("+"):
        name, number = re.fullmatch(r"([a-z]*)(\d+(?:\.\d+)?)?.*", part).groups()
        if part == name and name in PARTS:
            values |= PARTS[name]
        elif part == f"{name}{number}" and name in NUMBERS:
            values |= PARTS[name] | {NUMBERS[name]: float(number)}
        elif part == f"{name}{number}" and name == "refresh" and number.isdigit():
            values["cache_refresh_interval"] = int(number)
        else:
            raise ValueError(
                f"--arms {arm}: no part {part!r}; known: reference, {', '.join(PARTS)}, refreshN, and "
                f"{', '.join(NUMBERS)} with a number"
            )
    return LLaDAGenerationConfig(**values)


def our_arm(model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> Arm:
    """An arm that runs our sampler."""

    def run(prompts: list[Prompt]) -> Answers:
        token_ids, names = [p.token_ids for p in prompts], [p.index for p in prompts]
        output = model.generate(
            token_ids, generation_config=settings, return_dict_in_generate=True, record_ids=names
        )
        return Answers(output.completions, round(output.tokens_per_forward * int(output.steps.sum())))

    return run


def canvas_arm(model: LLaDAModelLM, sampler: Sampler) -> Arm:
    """An arm that runs a sampler of whole canvases."""
    end_ids = set(model.config.end_ids)

    def run(prompts: list[Prompt]) -> Answers:
        answers = sampler([p.token_ids for p in prompts])
        return Answers([before_end(answer, end_ids) for answer in answers], sum(map(len, answers)))

    return run


def before_end(answer: list[int], end_ids: set[int]) -> list[int]:
    """The tokens before the first EOS or EoT."""
    return next((answer[:i] for i, token in enumerate(answer) if token in end_ids), answer)
