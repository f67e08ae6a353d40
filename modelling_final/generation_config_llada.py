"""LLaDAGenerationConfig: every setting of the sampler, checked, saved as generation_config.json."""

import difflib
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# Setting -> default. The first group keeps the tokens of the published sampler; the second does not.
EXACT = {
    "gen_length": 128,
    "steps": None,
    "block_length": None,
    "method": "semi_autoregressive_padding",
    "temperature": 0.0,
    "cfg_scale": 0.0,
    "remasking": "low_confidence",
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "early_stop": True,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "seed": 0,
    "cuda_graphs": False,
}
APPROXIMATE = {
    "parallel_decoding": "none",
    "threshold": 0.9,
    "factor": 1.0,
    "entropy_bound": 0.1,
    "klass_kl": 0.01,
    "klass_steps": 2,
    "cache": "none",
    "cache_refresh_interval": 0,
    "remdm": "none",
    "remdm_eta": 0.04,
}
DEFAULTS = {**EXACT, **APPROXIMATE}
CHOICES = {
    "method": ("fixed_length", "semi_autoregressive_padding", "semi_autoregressive_origin"),
    "remasking": ("low_confidence", "random"),
    "parallel_decoding": ("none", "threshold", "factor", "entropy", "klass"),
    "cache": ("none", "prefix", "dual"),
    "remdm": ("none", "cap", "rescale", "conf"),
}
ORIGIN_BLOCK = 32  # tokens by which the canvas of semi_autoregressive_origin grows, as in the predecessor


class LLaDAGenerationConfig(GenerationConfig):
    """Settings of LLaDA's sampler. The defaults give the tokens of the published `generate.py`.

    Exact settings:
        gen_length: answer length in tokens (`max_new_tokens` is another name for it).
        steps: denoising steps over the whole answer, a multiple of the number of blocks; None: gen_length.
        block_length: tokens per block, a divisor of gen_length. None: one block of gen_length with
            semi_autoregressive_padding, 32 with semi_autoregressive_origin.
        method: semi_autoregressive_padding (blocks left to right, later blocks visible as masks),
            semi_autoregressive_origin (the canvas ends with the current block), or fixed_length (one block;
            block_length is without effect).
        temperature: 0 takes the most likely token; else tokens are drawn from softmax(logits / temperature).
        cfg_scale: w in l_u + (1 + w)(l_c - l_u); above 0 each step runs the model on the prompt masked, too.
        remasking: which tokens a step decides: low_confidence (the surest) or random.
        logits_eos_inf: EOS is never produced.
        confidence_eos_eot_inf: EOS and EoT are decided last (with low_confidence).
        early_stop: stop once an EOS or EoT has no mask before it, and put padding after it. The text up to
            it is the same. Off: the whole canvas is decided, as published.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer so far less likely. EOS and
            EoT are exempt, because every chat prompt contains them.
        num_return_sequences: answers per prompt.
        seed: with a record id and a candidate number, the key of every random draw.
        cuda_graphs: on a GPU, record forwards and replay them. Faster where sequences are short or cached;
            recording takes the time of two forwards for each shape.

    Approximate settings (they change the tokens; all off by default):
        parallel_decoding: how many tokens a step decides follows from the model's confidence instead of
            from `steps`: threshold, factor, entropy (entropy_bound in nats) or klass (threshold, klass_kl in
            nats, klass_steps).
        cache: keys and values outside the block (dual) or before it (prefix) are those of the block's start.
        cache_refresh_interval: recompute them every so many steps; 0: once a block.
        remdm: cap, rescale or conf: decided tokens of the block may become masks again. Takes the place of
            `remasking`.
        remdm_eta: strength of cap and rescale.
    """

    def __init__(self, **kwargs: Any) -> None:
        length = kwargs.pop("max_new_tokens", None)
        if length is not None and kwargs.get("gen_length") in (None, length):
            kwargs["gen_length"] = length
        elif length is not None:
            raise ValueError(
                f"max_new_tokens {length} and gen_length {kwargs['gen_length']}: give one of them"
            )
        for name, default in DEFAULTS.items():
            value = kwargs.pop(name, None)  # other GenerationConfigs write None for "not set"
            setattr(self, name, default if value is None else value)
        own = {name: getattr(self, name) for name in DEFAULTS}
        super().__init__(**kwargs)
        for name, value in own.items():  # the base class has set its own None for the names we share
            setattr(self, name, value)
        self.check()

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "LLaDAGenerationConfig":
        """The defaults: transformers asks at every construction, and a model's config has none of these."""
        return cls()

    @property
    def is_approximate(self) -> bool:
        """Whether these settings may give other tokens than the published sampler."""
        return (self.parallel_decoding, self.cache, self.remdm) != ("none", "none", "none")

    @property
    def is_random(self) -> bool:
        """Whether two candidates of one prompt can differ."""
        return self.temperature > 0 or self.remasking == "random" or self.remdm != "none"

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Nothing: transformers' checks warn of beams and do_sample. See `check`."""

    def check(self) -> None:
        """ValueError for a setting out of range, or for settings that exclude each other."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("gen_length", "steps", "block_length", "num_return_sequences", "klass_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        for name in ("temperature", "cfg_scale", "entropy_bound", "klass_kl", "cache_refresh_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("repetition_penalty", "factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("threshold", "remdm_eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        if self.parallel_decoding != "none" and self.remdm != "none":
            raise ValueError("parallel_decoding never takes a token back and remdm does: choose one of them")
        if self.parallel_decoding != "none" and self.remasking == "random":
            raise ValueError("parallel_decoding goes by confidence; it needs remasking low_confidence")
        if self.cache_refresh_interval and self.cache == "none":
            raise ValueError(
                f"cache_refresh_interval {self.cache_refresh_interval} needs cache prefix or dual"
            )
        if self.num_return_sequences > 1 and not self.is_random:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} would repeat one answer: "
                "set a temperature above 0, or remasking random"
            )

    def block_of(self, gen_length: int) -> int:
        """Tokens per block of an answer of `gen_length` tokens; ValueError unless blocks fill it."""
        if self.method == "fixed_length":
            return gen_length
        block_length = self.block_length
        if block_length is None:
            block_length = ORIGIN_BLOCK if self.method == "semi_autoregressive_origin" else gen_length
        if gen_length % block_length:
            near = max(1, round(gen_length / block_length)) * block_length
            raise ValueError(
                f"gen_length {gen_length} is not a multiple of block_length {block_length}; "
                f"the nearest that is: gen_length {near}"
            )
        return block_length

    def steps_per_block(self, gen_length: int) -> int:
        """Denoising steps in each block; ValueError unless the steps can be shared out evenly."""
        steps, num_blocks = self.steps or gen_length, gen_length // self.block_of(gen_length)
        if self.parallel_decoding == "none" and steps % num_blocks:
            near = max(1, round(steps / num_blocks)) * num_blocks
            raise ValueError(
                f"steps {steps} cannot be shared out evenly over {num_blocks} blocks (gen_length "
                f"{gen_length} / block_length {self.block_of(gen_length)}); they must be a multiple of "
                f"{num_blocks}, for example {near}"
            )
        return steps // num_blocks

    def changed(self, **overrides: Any) -> "LLaDAGenerationConfig":
        """A copy with some settings replaced. ValueError for a name that does not exist."""
        known = [*DEFAULTS, "max_new_tokens"]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DEFAULTS)}"
                raise ValueError(f"generate() has no setting {name!r}; {hint}")
        values = self.to_dict()
        if "max_new_tokens" in overrides:
            values.pop("gen_length")
        return type(self)(**{**values, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to generation_config.json: settings that differ from the defaults.

        `do_sample` is added where transformers' own classes would refuse or question the file without it.
        """
        values = super().to_diff_dict()
        values = {k: v for k, v in values.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        if "temperature" in values or "num_return_sequences" in values:
            values["do_sample"] = True
        return values
