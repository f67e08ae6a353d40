"""The autoregressive model that decides: its distribution after every prefix of the drafted chains.

K chains, G tokens of the longest, C tokens of text so far, V outputs of the model.

One forward for all chains. Keys and values of what is already known are kept, and those of rejected tokens
are cut off when the next text comes. Several chains go as a batch, each row with its own copy of the keys,
which any causal model allows (a tree of chains would need a 4-D mask, which not every model takes).
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

ROW_BY_ROW = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # these do not look at the text


class Verifier:
    """Scores continuations of one text at a time."""

    def __init__(
        self, model: PreTrainedModel, processors: LogitsProcessorList, *, uses_cache: bool = True
    ) -> None:
        """A verifier; `processors`: everything between its logits and its distribution (temperature, ...).

        ValueError: a model whose memory of rejected tokens cannot be taken back, such as Mamba.
        """
        config = model.config.get_text_config(decoder=True)
        # a linear-attention or recurrent layer has no keys of single tokens to cut off
        layers = DynamicCache(config=config).layers
        if (
            model.config.is_encoder_decoder
            or model._is_stateful
            or not model._supports_default_dynamic_cache()
        ):
            layers = [None]
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            raise ValueError(
                f"--verifier: {type(model).__name__} cannot verify drafts: it is no decoder whose keys and "
                "values of rejected tokens can be cut off"
            )
        self.model, self.processors, self.uses_cache = model.eval(), processors, uses_cache
        # a model with code of its own may not know transformers' newer name
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.device = next(model.parameters()).device
        self.forwards = 0
        self.start()

    def start(self) -> None:
        """Forgets the text."""
        self._rows: list[list[int]] = []  # tokens of each row of the cache
        self._cache: DynamicCache | None = None

    @torch.no_grad()
    def scores(self, text: Sequence[int], chains: Sequence[Sequence[int]]) -> Tensor:
        """Processed scores [K, G + 1, V]: entry [k, i] belongs to the token after text + chains[k][:i].

        Rows behind the end of a shorter chain mean nothing. float32, or float64 from a float64 model.
        """
        # chains often begin alike, and equal ones need one row only
        text, unique = list(text), list(dict.fromkeys(map(tuple, chains)))
        longest = max(map(len, unique))
        padded = [[*chain, *[text[-1]] * (longest - len(chain))] for chain in unique]
        logits = self._forward(text, padded, longest + 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = self._processed(text, padded, logits)
        if len(unique) == len(chains):
            return scores
        return scores[[unique.index(tuple(chain)) for chain in chains]]

    def _forward(self, text: list[int], chains: list[list[int]], num_logits: int) -> Tensor:
        """Logits [rows of chains, num_logits, V] of the last rows."""
        num_held = self._take_back(text)
        if len(chains) > 1 and self.uses_cache:
            # what all chains share is forwarded once, before the cache is copied for each
            if num_held < len(text) - 1:
                self._run([text[num_held:-1]], 1)
                num_held = len(text) - 1
            self._cache.batch_repeat_interleave(len(chains))
        self._rows = [text + chain for chain in chains]
        self.forwards += 1
        return self._run([text[num_held:] + chain for chain in chains], num_logits)

    def _run(self, rows: list[list[int]], num_logits: int) -> Tensor:
        # [K, whole prompt, V] logits of the first forward would be most of the memory
        limits = {"logits_to_keep": num_logits} if self.model._supports_logits_to_keep() else {}
        logits = self.model(
            input_ids=torch.tensor(rows, device=self.device),
            use_cache=self.uses_cache,
            **{self._cache_name: self._cache},
            **limits,
        ).logits
        return logits[:, -num_logits:]

    def _take_back(self, text: list[int]) -> int:
        """Cuts the cache to one row that begins as the text does; returns its number of tokens."""
        if not self.uses_cache:
            return 0
        if self._cache is None:
            # without the config: its sliding-window layers forget what a rejection has to bring back
            self._cache, self._rows = DynamicCache(), [[]]
        shared = [shared_length(row, text) for row in self._rows]
        # rows of the last round differ in their drafts; keep the one that was accepted furthest
        best = max(range(len(shared)), key=shared.__getitem__)
        if len(self._rows) > 1:
            self._cache.batch_select_indices(torch.tensor([best], device=self.device))
        num_held = min(shared[best], len(text) - 1)  # one token is left, or nothing would give logits
        self._cache.crop(num_held - len(self._rows[best]))
        return num_held

    def _processed(self, text: list[int], chains: list[list[int]], logits: Tensor) -> Tensor:
        if all(type(processor) in ROW_BY_ROW for processor in self.processors):
            return self.processors(None, logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
        # a repetition penalty and the like look at the text, which is another at every position
        scores = torch.empty_like(logits)
        for row, chain in enumerate(chains):
            tokens = torch.tensor([text + chain], device=self.device)
            for i in range(logits.shape[1]):
                scores[row, i] = self.processors(tokens[:, : len(text) + i], logits[row, i][None])[0]
        return scores


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at which both begin alike."""
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def warpers(*, temperature: float, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """What transformers' sampling does to logits [R, V] under these settings; nothing at temperature 0."""
    found = LogitsProcessorList()
    if temperature == 0:
        return found
    if temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found
