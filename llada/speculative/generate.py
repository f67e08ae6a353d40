"""Speculative decoding as a way of decoding of transformers' `generate`.

B prompts, P columns of the padded prompts, G columns of the longest answer, V outputs of the verifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from llada.speculative.bridge import Bridge
from llada.speculative.decoder import SpeculativeDecoder, SpeculativeStats
from llada.speculative.settings import SpeculativeSettings
from llada.speculative.verifier import ROW_BY_ROW
from modelling_final import LLaDAModelLM


@dataclass
class Speculation:
    """A `custom_generate`: the verifier decodes with a LLaDA model's drafts.

        verifier.generate(**inputs, max_new_tokens=200, custom_generate=Speculation(llada, bridge, settings))

    All of generate's logits processors and stopping criteria hold, for every drafted position.
    """

    drafter: LLaDAModelLM
    bridge: Bridge
    # how to draft and accept; do_sample, temperature, top-k, top-p and lengths are those of `generate`
    settings: SpeculativeSettings
    # each prompt in the drafter's tokens; default: the verifier's text, tokenised again
    drafter_prompts: Sequence[Sequence[int]] | None = None
    statistics: SpeculativeStats = field(default_factory=SpeculativeStats)  # adds up what it took

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: object,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """[B, P + G] long, or an output object; row i has the random draws of record i.

        ValueError: beams, a cache handed in, or what `SpeculativeDecoder` refuses.
        """
        settings = self._settings(generation_config, model_inputs)
        mask = model_inputs.get("attention_mask")
        answers, limit = [], generation_config.max_length - input_ids.shape[1]
        for row, tokens in enumerate(input_ids):
            padding = tokens[:0] if mask is None else tokens[~mask[row].bool()]
            prompt = tokens[len(padding) :].tolist()  # generate asks for padding on the left
            processors = _of_row(logits_processor, row, len(input_ids), padding)
            decoder = SpeculativeDecoder(self.drafter, model, self.bridge, settings, processors=processors)

            def is_done(answer: list[int], row: int = row) -> bool:
                text = torch.cat([input_ids[row], input_ids.new_tensor(answer)])
                return bool(stopping_criteria(text.expand(len(input_ids), -1), None)[row])

            canvas = self.drafter_prompts[row] if self.drafter_prompts else self.bridge.canvas_prompt(prompt)
            answer, stats = decoder.decode(
                prompt, canvas, record_id=row, max_new_tokens=limit, is_done=is_done
            )
            answers.append(answer)
            self.statistics += stats
        width = max(map(len, answers))
        pad = generation_config._pad_token_tensor  # EOS where the model names no padding, as in generate
        padded = [answer + [int(pad or 0)] * (width - len(answer)) for answer in answers]
        sequences = torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _settings(self, config: GenerationConfig, model_inputs: dict[str, object]) -> SpeculativeSettings:
        if (config.num_beams or 1) > 1:
            raise ValueError(f"num_beams {config.num_beams}: drafts are verified for one beam only")
        cache = model_inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("past_key_values: speculative decoding keeps its own cache; give the whole text")
        temperature = 1.0 if config.temperature is None else config.temperature
        return replace(self.settings, temperature=float(temperature) if config.do_sample else 0.0)


def _of_row(processors: LogitsProcessorList, row: int, num_rows: int, padding: Tensor) -> LogitsProcessorList:
    """`generate`'s processors as one row of its batch meets them: they may count rows and padding."""
    if all(type(processor) in ROW_BY_ROW for processor in processors):
        return processors

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        text = torch.cat([padding[None], tokens], dim=1).expand(num_rows, -1)
        return processors(text, scores.repeat(num_rows, 1))[row][None]

    return LogitsProcessorList([process])
