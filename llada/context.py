"""Longer contexts: how a model's rotary positions are stretched beyond those it was trained on."""

from dataclasses import dataclass

from modelling_final import LLaDAConfig

ROPE_SCALING = ("none", "linear", "ntk", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's positions are stretched to a longer context.

    linear divides positions by `factor`; ntk raises rope_theta by factor^(d / (d - 2)), d the head's width;
    yarn does either by frequency (arXiv 2309.00071). `factor` is the new context over the original one.
    """

    kind: str
    factor: float
    max_length: int

    def apply(self, config: LLaDAConfig) -> LLaDAConfig:
        """The config with stretched positions, changed in place; ValueError if the two do not fit."""
        if self.kind == "none":
            if self.factor != 1.0:
                raise ValueError(f"--rope_factor {self.factor} needs --rope_scaling")
            return config
        if self.factor <= 1.0:
            raise ValueError(
                f"--rope_factor {self.factor}: must be above 1, the new context / the original one"
            )
        old = config.rope_parameters
        original = old.get("original_max_position_embeddings", config.max_sequence_length)
        if self.max_length > round(original * self.factor):
            raise ValueError(
                f"--rope_factor {self.factor} stretches {original} tokens to "
                f"{round(original * self.factor)}, --max_length is {self.max_length}"
            )
        if self.kind == "ntk":
            config.rope_theta *= self.factor ** (config.head_dim / (config.head_dim - 2))
        else:
            config.rope_parameters = {
                "rope_type": self.kind,
                "factor": self.factor,
                "original_max_position_embeddings": original,
                "rope_theta": config.rope_theta,
            }
        config.max_sequence_length = max(self.max_length, config.max_sequence_length)
        return config


NO_SCALING = RopeScaling("none", 1.0, 0)
