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

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .canvas_llada import Canvas, Prompts, check_lengths, read_prompts
from .configuration_llada import LLaDAConfig
from .decoding_llada import Decoding, OnStep
from .generation_config_llada import LLaDAGenerationConfig
from .remasking_llada import random_key
from .stopping_llada import Stream, stop_of


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
    scores: tuple[Tensor, ...] | None = None  # G times [N, E], logits each token was decided from; 0 if none


class LLaDAGenerationMixin(GenerationMixin):
    """Gives a LLaDA model its `generate`, and its settings from generation_config.json."""

    generation_config_class = LLaDAGenerationConfig

    def adjust_generation_fn(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> None:
        """Reads generation_config.json as transformers does, then makes it a config of ours."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        self.generation_config = _own(self.generation_config)
        if self.generation_config.block_length is None:  # other programs' files have another name for it
            usual = self.generation_config_class.from_model_config(self.config)
            self.generation_config.block_length = usual.block_length

    def generate(
        self,
        inputs: Prompts | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Prompts | None = None,
        return_dict_in_generate: bool | None = None,
        **arguments: Any,
    ) -> Tensor | LLaDAGenerateOutput:
        """As everywhere in transformers: [N, P + G] prompts and answers; or all that `generate` below gives.

        `inputs`, or `input_ids`: [B, P], or B lists of token ids.
        """
        if (inputs is None) == (input_ids is None):
            raise ValueError("generate() needs the prompts: give input_ids")
        inputs = input_ids if inputs is None else inputs
        output = generate(self, inputs, generation_config=generation_config, **arguments)
        if return_dict_in_generate is None:
            config = self.generation_config if generation_config is None else generation_config
            return_dict_in_generate = config.return_dict_in_generate
        return output if return_dict_in_generate else output.sequences


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
    streamer: BaseStreamer | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: LogitsProcessorList | None = None,
    **overrides: Any,
) -> LLaDAGenerateOutput:
    """Answers to a batch of prompts; a prompt's answer does not depend on the rest of the batch.

    Args:
        model: a LLaDAModelLM, put into eval mode for the call.
        input_ids: [B, P] long padded on either side, or B lists of token ids of any lengths.
        attention_mask: [B, P], 1 = token, 0 = padding or otherwise hidden: as if it were not there.
        generation_config: settings; default the model's own.
        record_ids: B numbers that, with the seed, key the random draws; default 0, 1, ... Give each prompt
            of a data set its own number and it gets the same answer in any batch.
        gen_length: answer length in tokens, one for all or one for each prompt.
        suffixes: B lists of token ids that stand behind the answers, which then fill a hole (infill). Set
            early_stop to False, and logits_eos_inf, or an answer may end before its hole does.
        return_trace: collect what every step decided.
        on_step: called with every entry of the trace as it happens: {"row", "block", "step", "positions"
            (in the answer), "token_ids", "confidences", "remasked" (positions, ReMDM)}.
        streamer: of one prompt, gets its tokens, then the answer's from left to right as they are decided.
        stopping_criteria: an answer ends with the first token behind which one is fulfilled; looked at when a
            block is finished. The same with `stop_strings`, which need a `tokenizer`.
        overrides: settings that replace those of the config, by name. With `do_sample` and no `seed`, that
            comes from torch's generator, as the draws of transformers do.

    Raises:
        ValueError: a setting out of range or unknown, an empty prompt, a mask token in a prompt, or a prompt
            that with its answer is longer than the model's context.
    """
    if logits_processor:
        raise ValueError("generate() with a logits_processor has no meaning for a diffusion sampler")
    if isinstance(gen_length, int):
        overrides["gen_length"], gen_length = gen_length, None
    named = None if generation_config is None else generation_config.eos_token_id
    end_ids = _end_ids(model, overrides.pop("eos_token_id", named or "all"))
    settings = _settings(model, generation_config, overrides, input_ids if gen_length is None else None)

    prompts = read_prompts(input_ids, attention_mask, model.config.mask_token_id)
    suffixes = [list(suffix) for suffix in suffixes] if suffixes is not None else [[] for _ in prompts]
    if any(model.config.mask_token_id in suffix for suffix in suffixes):
        raise ValueError("a suffix contains the mask token; only the answer is masked")
    lengths = check_lengths(prompts, gen_length, suffixes, settings, model.config.max_sequence_length)
    _warn_of_blocks(model.config, max(map(settings.block_of, lengths)))
    if record_ids is None:
        record_ids = range(len(prompts))
    if len(record_ids) != len(prompts):
        raise ValueError(f"record_ids has {len(record_ids)} entries for {len(prompts)} prompts")

    num = settings.num_return_sequences
    keys = [random_key(settings.seed, record, c) for record in record_ids for c in range(num)]
    prompts, lengths, suffixes = (
        [x for x in rows for _ in range(num)] for rows in (prompts, lengths, suffixes)
    )
    ids = (settings.pad_token_id, model.config.pad_token_id, model.config.eos_token_id, 0)
    canvas = Canvas.of(prompts, lengths, suffixes, model, pad_id=next(i for i in ids if i is not None))

    trace: list[dict[str, Any]] = []
    stream = None if streamer is None else Stream(streamer, prompts, settings, end_ids)
    listeners = [trace.append if return_trace else None, stream and stream.note, on_step]
    listeners = [listener for listener in listeners if listener is not None]
    decoding = Decoding(
        model, settings, canvas, keys,
        end_ids=end_ids,
        on_step=(lambda entry: [listener(entry) for listener in listeners]) if listeners else None,
        stop=stop_of(stopping_criteria, settings.stop_strings, tokenizer),
    )  # fmt: skip
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        decoding.run()
    finally:
        for module in training:
            module.training = True
    given = canvas.tokens[:, : canvas.num_prompt]
    if isinstance(input_ids, Tensor):
        given = _left_padded(input_ids, attention_mask, canvas.pad_id).repeat_interleave(num, dim=0)
    output = _output(decoding, given, trace if return_trace else None)
    if stream is not None:
        answer = output.sequences[0, given.shape[1] :]
        stream.end(answer[: decoding.cuts[0]].tolist())
    return output


def _settings(
    model: nn.Module,
    generation_config: GenerationConfig | None,
    overrides: dict[str, Any],
    input_ids: Prompts | None,
) -> LLaDAGenerationConfig:
    """The settings of one call; `max_length` less the prompts, where it counts, becomes their gen_length."""
    settings = _own(model.generation_config if generation_config is None else generation_config)
    if overrides.get("do_sample") and "seed" not in overrides:
        overrides["seed"] = int(torch.randint(2**31, ()))
    total = overrides.get("max_length", settings.max_length)
    if isinstance(input_ids, Tensor) and total and not {"gen_length", "max_new_tokens"} & overrides.keys():
        width = input_ids.shape[1]
        if total <= width:
            raise ValueError(f"max_length {total} leaves no room behind prompts of {width} tokens")
        overrides["gen_length"] = total - width
    settings = settings.changed(**overrides)
    settings.refuse_unbuilt()
    return settings


def _end_ids(model: nn.Module, named: int | list[int] | str | None) -> list[int]:
    """Ids that end an answer: those named in a call; "all" = those of the model and its saved settings."""
    if named == "all":
        saved = model.generation_config.eos_token_id
        named = [*model.config.end_ids, *([saved] if isinstance(saved, int) else saved or [])]
    return sorted({named} if isinstance(named, int) else {int(i) for i in named or ()})


def _warn_of_blocks(config: LLaDAConfig, width: int) -> None:
    size = config.attention_block_size or 1
    if width > size > 1:
        warnings.warn(
            f"the model attends by blocks of {size} and finishes one before the next; here blocks of {width} "
            f"are decided in any order: give block_length {size}, and cache blocks for speed",
            stacklevel=3,
        )


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None, pad_id: int) -> Tensor:
    """The prompts as they were given, but padding on the right moved to the left, away from the answers."""
    if attention_mask is None:
        return input_ids
    rows = []
    for row, keep in zip(input_ids, attention_mask, strict=True):
        num_behind = int(keep.flip(0).argmax())
        rows.append(torch.cat([row.new_full((num_behind,), pad_id), row[: len(row) - num_behind]]))
    return torch.stack(rows)


def _own(config: GenerationConfig) -> LLaDAGenerationConfig:
    if isinstance(config, LLaDAGenerationConfig):
        return config
    return LLaDAGenerationConfig.from_dict(config.to_dict())


def _output(decoding: Decoding, given: Tensor, trace: list[dict[str, Any]] | None) -> LLaDAGenerateOutput:
    """The answers, cut at their end, behind the prompts [N, P]."""
    canvas, settings = decoding.canvas, decoding.settings
    answers = canvas.tokens[:, canvas.num_prompt :]
    columns = torch.arange(answers.shape[1], device=answers.device)
    is_answer = columns < torch.tensor(canvas.gen_lengths, device=answers.device)[:, None]
    is_kept = columns < torch.tensor(decoding.cuts, device=answers.device)[:, None]
    num_decided = int((is_answer & (answers != decoding.mask_id)).sum())
    before_end = (torch.isin(answers, decoding.end_ids).cumsum(dim=1) == 0) & is_kept
    lengths = before_end.sum(dim=1)
    if decoding.can_stop:  # what was decided behind the end depends on when we looked, so none of it stays
        answers = answers.masked_fill(is_answer & (columns > lengths[:, None]), canvas.pad_id)
    answers = answers.masked_fill(is_answer & ~is_kept, canvas.pad_id)
    cut = zip(answers.tolist(), lengths.tolist(), strict=True)
    return LLaDAGenerateOutput(
        sequences=torch.cat([given.to(answers.device), answers], dim=1),
        lengths=lengths,
        completions=[answer[:length] for answer, length in cut],
        steps=decoding.steps,
        forwards=decoding.forwards,
        tokens_per_forward=num_decided / max(1, int(decoding.steps.sum())),
        is_approximate=settings.is_approximate,
        trace=trace,
        scores=None if decoding.scores is None else decoding.scores.unbind(dim=1),
    )
