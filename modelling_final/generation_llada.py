"""The sampler: an answer of masks becomes tokens, block by block and step by step.

B prompts, N sequences (prompts times candidates), P prompt columns, G answer columns.

By default the tokens are those of the published `generate.py` (see `LLaDAGenerationConfig` for what is exact
and what is not). Where that program is broken, this is what happens here:
    * guidance works without an attention mask, and with left-padded batches;
    * `confidence_eos_eot_inf` holds EOS and EoT back at every temperature, not only at 0;
    * confidences are compared as log-odds, where they do not tie at 1.0, in float32 (float64 for a float64
      model) whatever the model's dtype; of equal ones the first position wins;
    * the mask token is never produced (there it can be, and is then predicted again or left in the answer).

What is left out without changing a token: the last block and the head for columns that cannot be decided,
steps that decide nothing, everything after the answer's end, finished sequences, the second branch at
guidance 0, and with random remasking the head for tokens whose turn it is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .canvas_llada import Canvas, Prompts, check_lengths, read_prompts
from .decoding_llada import Decoding, OnStep
from .generation_config_llada import LLaDAGenerationConfig
from .remasking_llada import random_key


@dataclass
class LLaDAGenerateOutput(ModelOutput):
    """Answers, and what they took. Row b * num_return_sequences + c is candidate c of prompt b."""

    sequences: Tensor | None = None  # [N, P + G] long: padded prompts, then answers (and suffixes)
    lengths: Tensor | None = None  # [N] long, tokens of each answer before its EOS or EoT
    completions: list[list[int]] | None = None  # the answers' token ids before their EOS or EoT
    steps: Tensor | None = None  # [N] long, forwards that each sequence took part in
    forwards: int | None = None  # calls of the model (with guidance both branches are one call)
    tokens_per_forward: float | None = None  # tokens decided, per sequence and forward
    is_approximate: bool | None = None  # whether a setting was on that may change the tokens
    trace: list[dict[str, Any]] | None = None  # one dict for each sequence and step; see `generate`


class LLaDAGenerationMixin(GenerationMixin):
    """Gives a LLaDA model its `generate`, and its settings from generation_config.json."""

    generation_config_class = LLaDAGenerationConfig

    def adjust_generation_fn(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> None:
        """Reads generation_config.json as transformers does, then makes it a config of ours."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        self.generation_config = _own(self.generation_config)

    def generate(
        self,
        input_ids: Prompts,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> LLaDAGenerateOutput:
        """Answers to a batch of prompts; see `generate` in this file."""
        return generate(self, input_ids, attention_mask, generation_config, **settings)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Prompts,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    record_ids: Sequence[int] | None = None,
    gen_length: int | Sequence[int] | None = None,
    suffixes: Sequence[Sequence[int]] | None = None,
    return_trace: bool = False,
    on_step: OnStep | None = None,
    **overrides: Any,
) -> LLaDAGenerateOutput:
    """Answers to a batch of prompts; a prompt's answer does not depend on the rest of the batch.

    Args:
        model: a LLaDAModelLM, put into eval mode for the call.
        input_ids: [B, P] long padded on either side, or B lists of token ids of any lengths.
        attention_mask: [B, P], 1 = token, 0 = padding; None: no padding.
        generation_config: settings; default the model's own.
        record_ids: B numbers that, with the seed, key the random draws; default 0, 1, ... Give each prompt
            of a data set its own number and it gets the same answer in any batch.
        gen_length: answer length in tokens, one for all or one for each prompt.
        suffixes: B lists of token ids that stand behind the answers, which then fill a hole (infill). Set
            early_stop to False, and logits_eos_inf, or an answer may end before its hole does.
        return_trace: collect what every step decided.
        on_step: called with every entry of the trace as it happens: {"row", "block", "step", "positions"
            (in the answer), "token_ids", "confidences", "remasked" (positions, ReMDM)}.
        overrides: settings that replace those of the config, by name.

    Raises:
        ValueError: a setting out of range or unknown, an empty prompt, a mask token in a prompt, or a prompt
            that with its answer is longer than the model's context.
    """
    settings = _own(generation_config if generation_config is not None else model.generation_config)
    if isinstance(gen_length, int):
        overrides["gen_length"], gen_length = gen_length, None
    settings = settings.changed(**overrides)

    prompts = read_prompts(input_ids, attention_mask, model.config.mask_token_id)
    suffixes = [list(suffix) for suffix in suffixes] if suffixes is not None else [[] for _ in prompts]
    if any(model.config.mask_token_id in suffix for suffix in suffixes):
        raise ValueError("a suffix contains the mask token; only the answer is masked")
    lengths = check_lengths(prompts, gen_length, suffixes, settings, model.config.max_sequence_length)
    if record_ids is None:
        record_ids = range(len(prompts))
    if len(record_ids) != len(prompts):
        raise ValueError(f"record_ids has {len(record_ids)} entries for {len(prompts)} prompts")

    candidates = range(settings.num_return_sequences)
    keys = [random_key(settings.seed, record, c) for record in record_ids for c in candidates]
    prompts = [prompt for prompt in prompts for _ in candidates]
    lengths = [length for length in lengths for _ in candidates]
    suffixes = [suffix for suffix in suffixes for _ in candidates]
    canvas = Canvas.of(prompts, lengths, suffixes, model)

    trace: list[dict[str, Any]] = []
    report = on_step
    if return_trace:
        report = trace.append if on_step is None else lambda entry: (trace.append(entry), on_step(entry))
    decoding = Decoding(model, settings, canvas, keys, report)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        decoding.run()
    finally:
        for module in training:
            module.training = True
    width = input_ids.shape[1] if isinstance(input_ids, Tensor) else canvas.num_prompt
    return _output(decoding, width, trace if return_trace else None)


def _own(config: GenerationConfig) -> LLaDAGenerationConfig:
    if isinstance(config, LLaDAGenerationConfig):
        return config
    return LLaDAGenerationConfig.from_dict(config.to_dict())


def _output(decoding: Decoding, width: int, trace: list[dict[str, Any]] | None) -> LLaDAGenerateOutput:
    """The answers, cut at their end, behind prompts padded to `width` columns."""
    canvas, settings = decoding.canvas, decoding.settings
    prompts, answers = canvas.tokens[:, : canvas.num_prompt], canvas.tokens[:, canvas.num_prompt :]
    columns = torch.arange(answers.shape[1], device=answers.device)
    is_answer = columns < torch.tensor(canvas.gen_lengths, device=answers.device)[:, None]
    num_decided = int((is_answer & (answers != decoding.mask_id)).sum())
    before_end = (torch.isin(answers, decoding.end_ids).cumsum(dim=1) == 0) & is_answer
    lengths = before_end.sum(dim=1)
    if decoding.can_stop:  # what was decided behind the end depends on when we looked, so none of it stays
        answers = answers.masked_fill(is_answer & (columns > lengths[:, None]), canvas.pad_id)
    padding = prompts.new_full((len(prompts), width - canvas.num_prompt), canvas.pad_id)
    cut = zip(answers.tolist(), lengths.tolist(), strict=True)
    return LLaDAGenerateOutput(
        sequences=torch.cat([padding, prompts, answers], dim=1),
        lengths=lengths,
        completions=[answer[:length] for answer, length in cut],
        steps=decoding.steps,
        forwards=decoding.forwards,
        tokens_per_forward=num_decided / max(1, int(decoding.steps.sum())),
        is_approximate=settings.is_approximate,
        trace=trace,
    )
