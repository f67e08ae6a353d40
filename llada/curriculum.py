"""A curriculum of masking and of length: short contexts, few masked tokens first. LLaDA's recipe has none."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Curriculum:
    """What a step may see, as a function of the step alone.

    Attributes:
        start_length: longest document of the first steps, in tokens; it doubles until it is `full_length`.
        length_steps: steps until documents are whole; 0 = whole from the start.
        start_mask_ratio: the largest time t of the first step; t is uniform in (0, largest).
        mask_steps: steps in which the largest t rises linearly to 1; 0 = 1 from the start.
    """

    start_length: int = 0
    full_length: int = 0
    length_steps: int = 0
    start_mask_ratio: float = 1.0
    mask_steps: int = 0

    def __post_init__(self) -> None:
        if self.length_steps and not 0 < self.start_length <= self.full_length:
            raise ValueError(
                f"--start_length {self.start_length} must be between 1 and --max_length {self.full_length}"
            )
        if not 0.0 < self.start_mask_ratio <= 1.0:
            raise ValueError(f"--start_mask_ratio {self.start_mask_ratio} must be in (0, 1]")

    def length(self, step: int) -> int | None:
        """Tokens after which documents are cut in this step; None = not at all."""
        if step >= self.length_steps or self.start_length == self.full_length:
            return None
        doublings = math.ceil(math.log2(self.full_length / self.start_length))
        return self.start_length * 2 ** (step * doublings // self.length_steps)

    def largest_t(self, step: int) -> float:
        """Upper end of the times of this step."""
        if step >= self.mask_steps:
            return 1.0
        return self.start_mask_ratio + (1.0 - self.start_mask_ratio) * step / self.mask_steps
