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


class LLaDAGenerationConfig(GenerationConfig, GenerateSettings):
    """Settings of LLaDA's sampler: those of `sampler_settings_llada.py`, and `num_return_sequences`.

    `max_new_tokens` is another name for `gen_length`.
    """

    def __init__(self, **kwargs: Any) -> None:
        length = kwargs.pop("max_new_tokens", None)
        if length is not None and kwargs.get("gen_length") in (None, length):
            kwargs["gen_length"] = length
        elif length is not None:
            raise ValueError(
                f"max_new_tokens {length} and gen_length {kwargs['gen_length']}: give one of them"
            )
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
        """The defaults: transformers asks at every construction, and a model's config has none of these."""
        return cls()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Nothing: transformers' checks warn of beams and do_sample. See `check`."""

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
