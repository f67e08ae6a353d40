"""The settings of speculative decoding, as flags: a script's Config inherits them."""

from dataclasses import dataclass

from llada.flags.declaration import flag

DRAFTS = ("one_pass", "left_to_right", "confidence")
RULES = ("auto", "block", "token", "match")


@dataclass(kw_only=True)
class SpeculativeSettings:
    """One flag per setting; `check` before use."""

    max_new_tokens: int = flag(128, help="Longest answer in the verifier's tokens.")
    temperature: float = flag(0.0, help="Of the verifier; 0: its most likely tokens.")
    top_k: int = flag(0, help="The verifier samples among its k most likely tokens; 0: all.")
    top_p: float = flag(1.0, help="The verifier samples among the fewest tokens of this total probability.")
    draft_length: int = flag(8, help="Masks of a draft, at most.")
    adaptive_length: bool = flag(
        False, help="Draft 1.5 times what was lately accepted, and 2 more, up to --draft_length."
    )
    draft: str = flag(
        "one_pass",
        help="one_pass: all masks from one forward. left_to_right: the first masks first. confidence: the "
        "surest tokens first (accepted by match only).",
        choices=DRAFTS,
    )
    draft_steps: int | None = flag(
        None, help="Forwards of a left_to_right or confidence draft; default one for each mask."
    )
    acceptance: str = flag(
        "auto",
        help="block, token: by the ratio of probabilities, a draft at once or token by token. match: as far "
        "as the verifier draws the same. auto: match at temperature 0, for confidence drafts and for "
        "--bridge text; else block, or token with several chains.",
        choices=RULES,
    )
    num_chains: int = flag(1, help="Drafts side by side for the same place.")
    draft_temperature: float | None = flag(None, help="Of the drafter; default the verifier's.")
    draft_top_p: float = flag(1.0, help="Like --top_p, of the drafter.")
    min_confidence: float = flag(
        0.0, help="A draft ends where the drafter's largest probability is below this; 0: never."
    )
    draft_cache: bool = flag(
        True, help="Keep the drafter's keys and values of the text so far; off: compute them for each draft."
    )
    seed: int = flag(0, help="Of every random draw.")

    def check(self) -> None:
        """ValueError for a setting out of range."""
        for name in ("max_new_tokens", "draft_length", "num_chains", "draft_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        for name in ("temperature", "top_k", "draft_temperature"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name} {value}: must not be negative")
        for name in ("top_p", "draft_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"--min_confidence {self.min_confidence}: must be from 0 to 1")
        for name, choices in (("draft", DRAFTS), ("acceptance", RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.num_chains > 1 and self.drafter_temperature == 0:
            raise ValueError(
                f"--num_chains {self.num_chains} would be the same chain: set --draft_temperature above 0"
            )
        if self.draft == "one_pass" and self.draft_steps not in (None, 1):
            raise ValueError(
                f"--draft_steps {self.draft_steps}: a one_pass draft has one; use left_to_right or confidence"
            )

    @property
    def drafter_temperature(self) -> float:
        """Of the drafter's draws."""
        return self.temperature if self.draft_temperature is None else self.draft_temperature

    def steps_of(self, length: int) -> int:
        """Forwards for a draft of `length` masks."""
        return 1 if self.draft == "one_pass" else min(length, self.draft_steps or length)

    def rule(self, bridge: str) -> str:
        """block, token or match; ValueError for one that would not be exact or does not apply."""
        match_only = None
        if self.temperature == 0:
            match_only = "temperature 0 leaves nothing to draw"
        elif self.drafter_temperature == 0:
            match_only = "--draft_temperature 0 draws nothing, so there is no probability to compare with"
        elif self.draft == "confidence":
            match_only = (
                "tokens of a confidence draft depend on tokens to their right, so ratios are not exact"
            )
        elif bridge == "text":
            match_only = "--bridge text has no probabilities of the verifier's tokens"
        if self.acceptance in ("block", "token") and match_only is not None:
            raise ValueError(f"--acceptance {self.acceptance}: {match_only}; use match or auto")
        if self.acceptance == "block" and self.num_chains > 1:
            raise ValueError(
                f"--acceptance block judges one chain, not --num_chains {self.num_chains}; use token or match"
            )
        if self.acceptance != "auto":
            return self.acceptance
        if match_only is not None:
            return "match"
        return "block" if self.num_chains == 1 else "token"
