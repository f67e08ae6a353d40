"""Every setting of the sampler, declared once: name, default, help, choices, range, and what excludes what.

`LLaDAGenerationConfig` is made of these, and so are the flags of every script that samples. Imports neither
torch nor transformers, because flags are read before those are loaded.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from .orders_llada import ORDERS, PROBABILITIES

ORIGIN_BLOCK = 32  # tokens by which the canvas of semi_autoregressive_origin grows, as in the predecessor


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help, its limits `choices`, `at_least`, `above`, `at_most`, and what it `needs`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(kw_only=True, eq=False)
class SamplerSettings:
    """Settings of LLaDA's sampler. The defaults give the tokens of the published `generate.py`."""

    # These keep the published tokens.
    method: str = setting(
        "semi_autoregressive_padding",
        "fixed_length: one block. semi_autoregressive_padding: blocks left to right, later ones visible as "
        "masks. semi_autoregressive_origin: the canvas ends with the current block.",
        choices=("fixed_length", "semi_autoregressive_padding", "semi_autoregressive_origin"),
    )
    gen_length: int = setting(128, "Answer length in tokens.", at_least=1)
    block_length: int | None = setting(
        None,
        "Tokens per block, a divisor of gen_length; without effect with fixed_length.",
        at_least=1,
    )
    steps: int | None = setting(
        None,
        "Denoising steps over the whole answer, a multiple of the number of blocks; default gen_length.",
        at_least=1,
    )
    temperature: float = setting(
        0.0, "0: the most likely token; else draws from softmax(logits / temperature).", at_least=0
    )
    top_k: int = setting(0, "Draw from the k most likely tokens only; 0: from all.", at_least=0)
    top_p: float = setting(
        1.0, "Draw from the fewest tokens that together have probability p.", above=0, at_most=1
    )
    cfg_scale: float = setting(
        0.0,
        "Classifier-free guidance w in l_u + (1 + w)(l_c - l_u); above 0 the model also runs on the prompt "
        "masked.",
        at_least=0,
    )
    remasking: str = setting(
        "low_confidence",
        "Which tokens a step decides: low_confidence, the draws that came out likeliest (the published "
        "order); random; or an order that does not look at the draw: max_probability, margin, entropy.",
        choices=tuple(ORDERS),
    )
    logits_eos_inf: bool = setting(False, "Never produce EOS.")
    confidence_eos_eot_inf: bool = setting(False, "Decide EOS and EoT last; not with random.")
    early_stop: bool = setting(
        True, "Stop once an EOS or EoT has no mask before it; the text up to it is the same."
    )
    repetition_penalty: float = setting(
        1.0, "Above 1: tokens that were there become less likely, but EOS and EoT.", above=0
    )
    seed: int = setting(0, "Of every random draw, with the record and the candidate.")
    cuda_graphs: bool = setting(
        False, "On a GPU, record forwards and replay them: the same tokens; faster where sequences are short."
    )

    # Approximate: these change the tokens.
    parallel_decoding: str = setting(
        "none",
        "How many tokens a step decides follows from confidence instead of from steps.",
        choices=("none", "threshold", "factor", "entropy", "klass"),
    )
    threshold: float = setting(
        0.9,
        "Confidence for threshold and klass.",
        at_least=0,
        at_most=1,
        needs="parallel_decoding=threshold|klass",
    )
    editing_threshold: float | None = setting(
        None,
        "Decided tokens of the block for which another is more probable than this give way to it (LLaDA2.1).",
        at_least=0,
        at_most=1,
        needs="parallel_decoding=threshold",
    )
    factor: float = setting(
        1.0, "f in (n + 1)(1 - c) < f for factor.", above=0, needs="parallel_decoding=factor"
    )
    entropy_bound: float = setting(0.1, "Nats for entropy.", at_least=0, needs="parallel_decoding=entropy")
    klass_kl: float = setting(
        0.01, "Nats that count as unchanged for klass.", at_least=0, needs="parallel_decoding=klass"
    )
    klass_steps: int = setting(2, "Unchanged steps for klass.", at_least=1, needs="parallel_decoding=klass")
    cache: str = setting(
        "none",
        "Keys and values outside the block (dual) or before it (prefix) are those of the block's start; "
        "blocks: those of finished blocks are kept, which for a model that attends by blocks is exact.",
        choices=("none", "prefix", "dual", "blocks"),
    )
    cache_refresh_interval: int = setting(
        0, "Recompute them every so many steps; 0: once a block.", at_least=0, needs="cache"
    )
    remdm: str = setting(
        "none",
        "Decided tokens of the block may be masked again; takes the place of remasking.",
        choices=("none", "cap", "rescale", "conf"),
    )
    remdm_eta: float = setting(
        0.04, "Strength of cap and rescale.", at_least=0, at_most=1, needs="remdm=cap|rescale"
    )

    @property
    def is_approximate(self) -> bool:
        """Whether a setting is on that trades the tokens that the order would give for speed."""
        return (self.parallel_decoding, self.remdm) != ("none", "none") or self.cache in ("prefix", "dual")

    @property
    def is_random(self) -> bool:
        """Whether two candidates of one prompt can differ."""
        return self.temperature > 0 or self.remasking == "random" or self.remdm != "none"

    def check(self) -> None:
        """ValueError for a setting out of range, or for settings that exclude each other."""
        for declared in fields(self):
            check_setting(declared, getattr(self, declared.name))
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            name = "top_k" if self.top_k > 0 else "top_p"
            raise ValueError(
                f"{name} {getattr(self, name)} cuts a distribution; it needs a temperature above 0"
            )
        if self.parallel_decoding != "none" and self.remdm != "none":
            raise ValueError("parallel_decoding never takes a token back and remdm does: choose one of them")
        if self.editing_threshold is not None and self.parallel_decoding != "threshold":
            raise ValueError(
                f"editing_threshold {self.editing_threshold} needs parallel_decoding threshold, "
                f"not {self.parallel_decoding}"
            )
        if self.parallel_decoding != "none" and self.remasking not in PROBABILITIES:
            raise ValueError(
                f"parallel_decoding goes by a probability; it needs remasking {' or '.join(PROBABILITIES)}, "
                f"not {self.remasking}"
            )
        if self.cache == "blocks" and self.cfg_scale > 0:
            raise ValueError("cache blocks keeps no second branch for cfg_scale; choose one of them")
        if self.cache_refresh_interval and self.cache in ("none", "blocks"):
            raise ValueError(
                f"cache_refresh_interval {self.cache_refresh_interval} needs cache prefix or dual"
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


def check_setting(declared: Field, value: Any) -> None:
    """ValueError with the name and what would be right, if the value is outside what the field declares."""
    name, limits = declared.name, declared.metadata
    if value is None and declared.default is None:
        return
    if "choices" in limits:
        if value not in limits["choices"]:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(limits['choices'])}")
        return
    if declared.type is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return
    is_whole = declared.type in (int, int | None)
    low, high = limits.get("at_least", limits.get("above")), limits.get("at_most")
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if (
        not is_number
        or value != value  # nan
        or (low is not None and (value < low or (value == low and "above" in limits)))
        or (high is not None and value > high)
    ):
        span = "" if low is None else f" above {low}" if "above" in limits else f" of at least {low}"
        span = span if high is None else f" from {low} to {high}"
        raise ValueError(f"{name} must be a {'whole ' * is_whole}number{span}, got {value!r}")
