"""Flags that several scripts share about data. Nothing slow is imported: see llada/flags/parser.py."""

from dataclasses import dataclass, fields

from llada.data.fields import Reader
from llada.flags.declaration import flag

SHARD_SIZE = 10_000


@dataclass(kw_only=True)
class RecordFlags:
    """Flags of whoever reads records. A field that is not named is found: see data/README.md."""

    bad_records: str = flag(
        "error",
        help="A record that cannot be used: stop and name it, or drop it, count it, and name the first ten.",
        choices=["error", "drop"],
    )

    def reader(self) -> Reader:
        """How records are read."""
        named = {field.name: getattr(self, field.name, field.default) for field in fields(Reader)}
        return Reader(**{**named, "drops_bad": self.bad_records == "drop"})


@dataclass(kw_only=True)
class SpellingFlags:
    """Flags of whoever turns texts of records into tokens."""

    parse_special_tokens: bool = flag(
        False, "Special tokens that a text spells out are these tokens, instead of text."
    )


@dataclass(kw_only=True)
class TextFlags(RecordFlags, SpellingFlags):
    """Flags of whoever reads documents."""

    text_key: str | None = flag(None, help="Field of the document; default text.")


@dataclass(kw_only=True)
class QuestionFlags(RecordFlags):
    """Flags of whoever reads questions."""

    prompt_key: str | None = flag(None, help="Field of the prompt, a text or messages.")
    messages_key: str | None = flag(None, help="Field of the conversation.")
    system_key: str | None = flag(None, help="Field of the system message.")
    transcript: bool = flag(
        False, help='Texts of the form "\\n\\nHuman: ...\\n\\nAssistant: ..." are conversations.'
    )


@dataclass(kw_only=True)
class ConversationFlags(QuestionFlags):
    """Flags of whoever reads questions with their answer."""

    answer_key: str | None = flag(None, help="Field of the answer, a text or messages.")


@dataclass(kw_only=True)
class PairFlags(QuestionFlags, SpellingFlags):
    """Flags of whoever reads two answers to a question."""

    chosen_key: str | None = flag(None, help="Field of the preferred answer.")
    rejected_key: str | None = flag(None, help="Field of the other answer.")


@dataclass(kw_only=True)
class LabelledFlags(ConversationFlags, PairFlags):
    """Flags of whoever reads labelled answers; a pair counts as two."""

    label_key: str | None = flag(None, help="Field that says whether the answer is desirable.")


@dataclass(kw_only=True)
class AnswerFlags:
    """Flags of whoever scores answers; see llada/data/answers.py."""

    apply_chat_template: bool = flag(
        False, "Prompts and answers that are plain texts become turns; messages always use the template."
    )
    eos: str = flag(
        "one",
        "What ends an answer: its end-of-turn token and one EOS, these and EOS that count up to "
        "--max_length, nothing, or ELBO-KTO's attended EOS padding up to --max_length.",
        choices=["one", "filled", "none", "padded"],
        fixed=True,
    )
    long: str = flag(
        "error",
        "Answers beyond --max_length: stop, drop and count, or cut and count.",
        choices=["error", "drop", "truncate"],
    )


@dataclass(kw_only=True)
class PrepareFlags:
    """What is read, and the rows that are written."""

    input: list[str] = flag(help="Files or folders (their kinds: data/README.md).", reads="path")
    tokenizer_name: str = flag(
        help="Folder of the tokenizer, or of the checkpoint to be trained.", reads="model"
    )
    output_dir: str = flag(help="Folder for train/ and validation/.", writes="folder")
    max_length: int = flag(4096, "Longest row in tokens.", at_least=1)
    validation_fraction: float = flag(
        0.0, "Share of the documents or conversations to hold out.", at_least=0, below=1
    )
    num_proc: int = flag(1, "Processes that tokenise.", at_least=1)
    shard_size: int = flag(SHARD_SIZE, "Records a shard: a stopped run repeats at most one.", at_least=1)
    overwrite: bool = flag(False, "Start again where OUTPUT_DIR holds rows already.")

    def splits(self) -> dict[str, tuple[float, float]]:
        """The part of [0, 1) whose records each split gets."""
        fraction = self.validation_fraction
        return {"train": (fraction, 1.0)} | ({"validation": (0.0, fraction)} if fraction else {})


@dataclass(kw_only=True)
class PromptFlags(QuestionFlags, SpellingFlags):
    """A prompt, or a file of them."""

    prompt: str | None = flag(None, "A prompt; its answer goes to the terminal.")
    prompts_file: str | None = flag(None, "File of prompts.", reads="path")
    output_path: str | None = flag(None, "JSONL file of answers; needed with --prompts_file.", writes="file")
    max_samples: int | None = flag(None, "Only the first so many prompts of the file.", at_least=1)
    is_instruct: bool = flag(False, "Use the chat template (with two models, each its own).")

    def check_flags(self) -> None:
        """One source of prompts, and a place for a file's answers."""
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("give either --prompt TEXT or --prompts_file FILE")
        if self.prompts_file is not None and self.output_path is None:
            raise ValueError("--prompts_file needs --output_path FILE.jsonl for the answers")
