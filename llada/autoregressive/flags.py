"""Flags of alignment on the student's own tracks; readable without torch."""

from dataclasses import dataclass

from llada.flags.declaration import flag
from modelling_final.orders_llada import ORDERS


@dataclass(kw_only=True)
class OnPolicyFlags:
    """What the student visits by itself, and who judges it there."""

    on_policy: str = flag(
        "none",
        help="drafts: windows begin where the student's own drafts would, along the answers of the rows. "
        "answers: --train_data_path holds prompts, the student answers, and --teacher judges a state that "
        "its sampler visited by the causal prefixes of what came out. self: there, the student is the "
        "teacher, which sees more of a verified answer of its own.",
        choices=["none", "drafts", "answers", "self"],
    )
    teacher: str | None = flag(
        None, help="Autoregressive checkpoint that judges.", needs="on_policy=answers", reads="model"
    )
    teacher_dtype: str = flag(
        "auto", help="Of its weights.", choices=["auto", "float32", "bfloat16", "float16"], needs="teacher"
    )
    teacher_top_k: int = flag(
        64, help="Tokens kept of each distribution; 0: all.", at_least=0, needs="on_policy=answers|self"
    )
    teacher_sees: str = flag(
        "answer",
        help="Behind the state a right answer to the same prompt, of another trajectory if there is one; or "
        "a share of what this one, if it came out right, wrote in later blocks (future).",
        choices=["answer", "future"],
        needs="on_policy=self",
    )
    teacher_share: float = flag(0.25, help="That share.", above=0, at_most=1, needs="teacher_sees=future")
    teacher_positions: int = flag(
        0,
        help="Learn at so many positions of a state, where the teacher is surest; 0: at all.",
        at_least=0,
        needs="on_policy=answers|self",
    )
    fixed_teacher: bool = flag(
        False, help="The student as it started is the teacher, not as it is.", needs="on_policy=self"
    )
    gen_length: int = flag(128, help="Tokens of an answer.", at_least=1, needs="on_policy=answers|self")
    block_length: int | None = flag(
        None,
        help="Tokens per block; default the model's attention block, or all in one.",
        at_least=1,
        needs="on_policy=answers|self",
    )
    steps: int | None = flag(
        None, help="Denoising steps; default one a token.", at_least=1, needs="on_policy=answers|self"
    )
    remasking: str = flag(
        "max_probability",
        help="Order in which the student decides.",
        choices=tuple(ORDERS),
        needs="on_policy=answers|self",
    )
    sampling_temperature: float = flag(
        1.0, help="Of the student's answers.", at_least=0, needs="on_policy=answers|self"
    )
    num_generations: int = flag(
        4, help="Answers to a prompt, of which one must be right.", at_least=1, needs="on_policy=self"
    )
    reward_funcs: list[str] = flag(
        [], help="What verifies an answer, above 0.5; as for make_preferences.py.", needs="on_policy=self"
    )

    @property
    def asks_student(self) -> bool:
        """Whether the data are prompts, which the student answers."""
        return self.on_policy in ("answers", "self")

    def check_flags(self) -> None:
        """A judge for the answers."""
        if self.on_policy == "answers" and self.teacher is None:
            raise ValueError("--on_policy answers needs --teacher, the model that judges the answers")
        if self.on_policy == "self" and not self.reward_funcs:
            raise ValueError("--on_policy self needs --reward_funcs, to know which answers are right")
        if self.teacher_sees == "future" and (self.block_length or self.gen_length) >= self.gen_length:
            raise ValueError(
                f"--teacher_sees future needs a later block: give --block_length below {self.gen_length}, "
                "the --gen_length"
            )
