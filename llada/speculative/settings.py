"""The settings of speculative decoding, as flags: a script's Config inherits them."""

from dataclasses import dataclass

from llada.flags.declaration import check_needs, check_value, flag, own_names, said_of

DRAFTS = ("one_pass", "left_to_right", "confidence")
RULES = ("auto", "block", "token", "match")


@dataclass(kw_only=True)
class SpeculativeSettings:
    """Drafting and acceptance."""

    max_new_tokens: int = flag(128, "Longest answer in the verifier's tokens.", at_least=1)
    temperature: float = flag(0.0, "Of the verifier; 0: its most likely tokens.", at_least=0)
    top_k: int = flag(
        0, "The verifier samples among its k most likely tokens; 0: all.", at_least=0, needs="temperature"
    )
    top_p: float = flag(
        1.0,
        "The verifier samples among the fewest tokens of this total probability.",
        above=0,
        at_most=1,
        needs="temperature",
    )
    draft_length: int = flag(8, "Masks of a draft, at most.", at_least=1)
    adaptive_length: bool = flag(
        False, "Draft 1.5 times what was lately accepted, and 2 more, up to --draft_length."
    )
    draft: str = flag(
        "one_pass",
        "one_pass: all masks from one forward. left_to_right: the first masks first. confidence: the surest "
        "tokens first (accepted by match only).",
        choices=DRAFTS,
    )
    draft_steps: int | None = flag(
        None,
        "Forwards of a draft; default one for each mask.",
        at_least=1,
        needs="draft=left_to_right|confidence",
    )
    acceptance: str = flag(
        "auto",
        "block, token: by the ratio of probabilities, a draft at once or token by token. match: as far as "
        "the verifier draws the same. auto: match at temperature 0, for confidence drafts and for --bridge "
        "text; else block, or token with several chains.",
        choices=RULES,
    )
    num_chains: int = flag(1, "Drafts side by side for the same place.", at_least=1)
    draft_temperature: float | None = flag(None, "Of the drafter; default the verifier's.", at_least=0)
    draft_top_p: float = flag(1.0, "Like --top_p, of the drafter.", above=0, at_most=1)
    min_confidence: float = flag(
        0.0,
        "A draft ends where the drafter's largest probability is below this; 0: never.",
        at_least=0,
        at_most=1,
    )
    draft_cache: bool = flag(
        True, "Keep the drafter's keys and values of the text so far; off: compute them for each draft."
    )
    seed: int = flag(42, "Of every random draw.", at_least=0)

    def check(self) -> None:
        """ValueError for a setting out of range, or one without effect."""
        for name in own_names(SpeculativeSettings):
            check_value(name, getattr(self, name), said_of(type(self), name))
        check_needs(self, layer_of={})
        self.check_flags()

    def check_flags(self) -> None:
        """Chains that differ."""
        if self.num_chains > 1 and self.drafter_temperature == 0:
            raise ValueError(
                f"--num_chains {self.num_chains} would be the same chain: set --draft_temperature above 0"
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
