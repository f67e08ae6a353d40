"""LLaDAGenerationConfig: the sampler's settings as transformers keeps them, in generation_config.json."""

import difflib
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .sampler_settings_llada import SamplerSettings, setting


@dataclass(kw_only=True, eq=False)
class GenerateSettings(SamplerSettings):
    """What one call of `generate` takes."""

    num_return_sequences: int = setting(1, "Answers per prompt.", at_least=1)

    def check(self) -> None:
        """As for the sampler's, and several answers need a reason to differ."""
        super().check()
        if self.num_return_sequences > 1 and not self.is_random:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} would repeat one answer: "
                "set a temperature above 0, or remasking random"
            )


DEFAULTS = {declared.name: declared.default for declared in fields(GenerateSettings)}
# Names of transformers' own that mean something here; `use_cache` wishes for speed, never for other tokens.
SHARED = (
    "max_new_tokens", "max_length", "do_sample", "eos_token_id", "pad_token_id", "bos_token_id",
    "stop_strings", "return_dict_in_generate", "output_scores", "use_cache", "disable_compile",
    "transformers_version", "_from_model_config",
)  # fmt: skip
INSTEAD = {
    "guidance_scale": "cfg_scale guides",
    "cache_implementation": "see cache",
    "num_beams": "num_return_sequences gives several answers, and an order has no beams",
}


class LLaDAGenerationConfig(GenerationConfig, GenerateSettings):
    """The sampler's settings, of `sampler_settings_llada.py`, and those it shares with transformers.

    `max_new_tokens` is another name for `gen_length`. `do_sample` True draws at temperature 1 where none is
    given, False takes the most likely tokens whatever the temperature. `max_length` counts the prompt.
    """

    def __init__(self, **kwargs: Any) -> None:
        length = kwargs.pop("max_new_tokens", None)
        if length is not None and kwargs.get("gen_length") in (None, length):
            kwargs["gen_length"] = length
        elif length is not None:
            raise ValueError(
                f"max_new_tokens {length} and gen_length {kwargs['gen_length']}: give one of them"
            )
        if kwargs.get("gen_length") is not None:
            kwargs["max_length"] = None  # as in transformers, the answer's own length wins
        do_sample = kwargs.pop("do_sample", None)
        if do_sample and not kwargs.get("temperature"):
            kwargs["temperature"] = 1.0
        elif do_sample is False:
            kwargs |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        own = {}
        for name, default in DEFAULTS.items():
            value = kwargs.pop(name, None)  # other GenerationConfigs write None for "not set"
            own[name] = default if value is None else value
        super().__init__(**kwargs)
        for name, value in own.items():  # the base class has set its own None for the names we share
            setattr(self, name, value)
        self.check()

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "LLaDAGenerationConfig":
        """The defaults; a model whose attention goes by blocks answers in the same blocks."""
        settings = model_config if isinstance(model_config, dict) else vars(model_config)
        size = settings.get("attention_block_size") or 0
        return cls(block_length=size if size > 1 else None)  # 1: a causal model, that drafts in parallel

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Nothing: transformers' checks warn of beams and do_sample. See `check`."""

    def refuse_unbuilt(self) -> None:
        """ValueError for the first setting of transformers' that has no meaning here."""
        usual = GenerationConfig._get_default_generation_params()
        for name in sorted(GenerationConfig().to_dict().keys() - {*DEFAULTS, *SHARED}):
            value = getattr(self, name, None)
            if value not in (None, usual.get(name)):
                raise ValueError(
                    f"generate() with {name} {value!r} has no meaning for a diffusion sampler"
                    f"{f'; {INSTEAD[name]}' if name in INSTEAD else ''}"
                )

    def changed(self, **overrides: Any) -> "LLaDAGenerationConfig":
        """A copy with some settings replaced. ValueError for a name that does not exist."""
        values = self.to_dict()
        known = {*DEFAULTS, *SHARED, *values}
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DEFAULTS)}"
                raise ValueError(f"generate() has no setting {name!r}; {hint}")
        lengths = overrides.keys() & {"gen_length", "max_new_tokens"}
        if "max_new_tokens" in lengths or (not lengths and (values | overrides).get("max_length")):
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
