"""Store a teacher's distributions beside answers, in the student's tokens, for alignment/train_kl.py.

Three teachers:
    --teacher folder     an autoregressive checkpoint: it scores the records' answers, or with --responses
                         generate answers the prompts itself and is scored along its own answers
    --server url         an OpenAI-compatible server that gives logprobs; it answers the prompts
    neither              the input holds logits already: JSON files of the systems we succeed (data/README.md)

Of each distribution the --top_k most likely tokens are kept; everything else is one number, the rest. A
record that does not fit stops the run with file:line; a stopped run continues. More: docs/alignment.md.

Run:
    python alignment/precompute_teacher.py --input gsm8k/train.jsonl --tokenizer runs/drafter \\
        --teacher models/SmolLM2-135M-Instruct --responses generate --output_dir runs/teacher/train
    python alignment/precompute_teacher.py --input prompts.jsonl --tokenizer models/LLaDA-8B-Instruct \\
        --server http://127.0.0.1:8000/v1 --server_model llama-3.3-70b --top_k 20 --output_dir runs/teacher
    python alignment/precompute_teacher.py --input_file sft_data/llama_logits.json \\
        --output_file sft_data/processed_alignment --model_name models/LLaDA-8B-Instruct --max_length 4096
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from llada.chat_client import ChatClient
from llada.data.flags import ConversationFlags
from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config(ConversationFlags):
    """Teacher rows."""

    input: list[str] = flag(
        help="Conversations, prompts, or records with logits: .json, .jsonl, ...", reads="path"
    )
    validation_input: list[str] | None = flag(
        None, "Records to validate on: OUTPUT_DIR then gets train/ and validation/.", reads="path"
    )
    output_dir: str = flag(help="Folder for the rows.", writes="folder")
    tokenizer_name: str = flag(help="Folder of the student's tokenizer, or of its checkpoint.", reads="model")
    teacher: str | None = flag(None, "Autoregressive checkpoint folder or hub name.", reads="model")
    teacher_gguf_file: str | None = flag(None, "Name of a GGUF file in that folder.", needs="teacher")
    teacher_dtype: str = flag(
        "auto",
        "Of its weights; auto: as saved.",
        choices=["auto", "float32", "bfloat16", "float16"],
        needs="teacher",
    )
    teacher_tokenizer: str | None = flag(
        None,
        "Tokenizer of the model that made the records' logits; default the student's.",
        reads="model",
        needs="teacher=None",
    )
    server: str | None = flag(None, "Base URL of an OpenAI-compatible server, up to /v1.")
    server_model: str = flag("default", "Model name that the server knows.", needs="server")
    server_key_env: str = flag(
        "OPENAI_API_KEY", "Environment variable with the server's key, if any.", needs="server"
    )
    server_concurrency: int = flag(4, "Requests at once.", at_least=1, needs="server")
    server_timeout: float = flag(120.0, "Seconds for one answer.", above=0, needs="server")
    responses: str = flag(
        "given", "The records' answers, or the teacher's own.", choices=["given", "generate"], needs="teacher"
    )
    top_k: int = flag(32, "Tokens kept of each distribution; 0 = all of them, 4 bytes each.", at_least=0)
    temperature: float = flag(1.0, "Of generated answers; the stored distributions are at 1.", at_least=0)
    max_new_tokens: int = flag(256, "Longest generated answer in the teacher's tokens.", at_least=1)
    max_length: int = flag(4096, "Longest row in the student's tokens.", at_least=1)
    long: str = flag(
        "error", "Rows over --max_length: error, drop, or truncate.", choices=["error", "drop", "truncate"]
    )
    limit: int | None = flag(None, "Only the first N records.", at_least=1)
    batch_size: int = flag(16, "Answers in one forward of the teacher.", at_least=1)
    shard_size: int | None = flag(
        None,
        "Records a shard: a stopped run repeats at most one. Default 256, with --top_k 0 8.",
        at_least=1,
    )
    seed: int = flag(42, "Key of generated answers.", at_least=0)
    device: str | None = flag(None, "cpu, cuda, ...; default the GPU if there is one.")
    overwrite: bool = flag(False, "Start again where OUTPUT_DIR holds rows already.")

    def check_flags(self) -> None:
        """One teacher, and what it can give."""
        if self.teacher is not None and self.server is not None:
            raise ValueError("give --teacher or --server, not both")
        if self.server is not None and self.teacher_tokenizer is not None:
            raise ValueError(f"--teacher_tokenizer {self.teacher_tokenizer}: has no effect beside --server")
        if self.server is not None and not self.top_k:
            raise ValueError("--top_k 0: a server gives the most likely tokens only; ask for 1 to 20")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from llada.autoregressive.causal_lm import describe_causal_lm, load_causal_lm
from llada.autoregressive.teacher_files import TeacherFile, read_teacher_records
from llada.autoregressive.teacher_model import NO_NUMBERS, Question, TeacherModel
from llada.autoregressive.teacher_rows import (
    KIND,
    Student,
    TeacherAnswer,
    as_columns,
    count,
    fit_length,
)
from llada.autoregressive.teacher_server import ServerTeacher
from llada.data.fields import as_turns
from llada.data.files import files_of
from llada.data.reading import Record, describe_losses, read
from llada.data.shards import Columns, Item, describe_inputs, describe_tokenizer, read_manifest, write_shards
from llada.models.tokens import load_tokenizer


def questions(config: Config, paths: list[str], bar: tqdm, counts: Counter) -> Iterator[Item]:
    """(file:line, Question) of these files; the answer is the last assistant turn."""

    def question(record: Record) -> Question:
        if config.teacher is None or config.responses == "generate":
            return Question(record.where, as_turns(record.prompt(), "user"), None)
        messages = record.messages()
        while messages[-1]["role"] != "assistant":
            messages.pop()
        return Question(record.where, messages[:-1], messages[-1]["content"].strip())

    for path in paths:
        for where, _, found in read(path, config.reader(), question, counts, on_bytes=bar.update):
            yield where, found


def encode(
    items: list[Item], answers: Iterable[TeacherAnswer | None], config: Config
) -> tuple[Columns, Counter]:
    """A shard's columns and counts."""
    kept, counts = [], Counter(records=len(items), dropped=0, truncated=0, no_text=0)
    for (where, _), answer in zip(items, answers, strict=True):
        if answer is None or not len(answer.positions):
            counts["no_text"] += 1
            continue
        # a teacher in half precision can overflow; such a row would poison training in silence
        if np.isnan(answer.distributions.log_probs).any() or np.isnan(answer.distributions.log_rest).any():
            raise ValueError(NO_NUMBERS % where)
        fitted = fit_length(answer, where, max_length=config.max_length, long=config.long)
        counts["dropped"] += fitted is None
        counts["truncated"] += fitted is not None and fitted is not answer
        kept += [fitted] if fitted else []
    counts.update(count(kept))
    return (as_columns(kept) if kept else {}), counts


def main(argv: list[str] | None = None) -> None:
    """Writes the rows and prints what they hold."""
    config = parse(Config, argv, description=__doc__)
    student = Student(load_tokenizer(config.tokenizer_name, chat=True))
    if config.server is not None:
        from_server(config, student)
    elif config.teacher is not None:
        from_model(config, student)
    else:
        from_files(config, student)


def from_files(config: Config, student: Student) -> None:
    """Rows from records with logits."""
    teacher = AutoTokenizer.from_pretrained(config.teacher_tokenizer) if config.teacher_tokenizer else None
    file = TeacherFile(student, teacher, top_k=config.top_k)

    def items(paths: list[str], bar: tqdm, _: Counter) -> Iterator[Item]:
        for path in paths:
            for where, record in read_teacher_records(path, bar.update):
                yield where, file.answer(record, where)

    source = {"teacher_tokenizer": teacher and describe_tokenizer(teacher, with_template=False)}
    write(config, student, items, lambda found: [answer for _, answer in found], source)
    if file.num_ignored:
        print(
            f"{file.num_ignored} positions have 'full_logits' that are not as wide as the teacher's "
            "vocabulary; their 'top_5' was used"
        )


def from_model(config: Config, student: Student) -> None:
    """Rows from an autoregressive checkpoint."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_causal_lm(
        config.teacher,
        flag="--teacher",
        gguf_file=config.teacher_gguf_file,
        dtype=config.teacher_dtype,
        device=device,
    )
    teacher = TeacherModel(
        model, tokenizer, student, top_k=config.top_k, temperature=config.temperature,
        max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, seed=config.seed,
    )  # fmt: skip
    if not teacher.vocabulary.is_identity:
        print(f"{teacher.vocabulary.coverage:.1%} of the teacher's tokens are tokens of the student too")
    described = describe_causal_lm(config.teacher, config.teacher_gguf_file)
    source = {"teacher": described, "responses": config.responses}
    if config.responses == "generate":
        source |= {name: getattr(config, name) for name in ("temperature", "max_new_tokens", "seed")}

    def answers(items: list[Item]) -> Iterable[TeacherAnswer | None]:
        return teacher.answers([question for _, question in items])

    write(config, student, partial(questions, config), answers, source)


def from_server(config: Config, student: Student) -> None:
    """Rows from a server's answers."""
    client = ChatClient(
        base_url=config.server, model=config.server_model, api_key_env=config.server_key_env,
        temperature=config.temperature, max_tokens=config.max_new_tokens, seed=config.seed,
        timeout=config.server_timeout, max_retries=4, url_flag="--server", model_flag="--server_model",
    )  # fmt: skip
    server = ServerTeacher(client, top_k=config.top_k)

    def answers(items: list[Item]) -> list[TeacherAnswer | None]:
        with ThreadPoolExecutor(config.server_concurrency) as pool:
            return list(pool.map(lambda item: server.answer(item[1].messages, student, item[0]), items))

    names = ("server_model", "temperature", "seed", "max_new_tokens")
    source = {name: getattr(config, name) for name in names}
    write(config, student, partial(questions, config), answers, source)


def write(
    config: Config,
    student: Student,
    items: Callable[[list[str], tqdm, Counter], Iterator[Item]],
    answers_of: Callable[[list[Item]], Iterable[TeacherAnswer | None]],
    source: dict[str, object],
) -> None:
    """Writes the rows of the input, and those of the validation input; `source` decides their numbers."""
    splits = {config.output_dir: config.input}
    if config.validation_input is not None:
        splits = {f"{config.output_dir}/train": config.input,
                  f"{config.output_dir}/validation": config.validation_input}  # fmt: skip
    settings = {name: getattr(config, name) for name in ("max_length", "long", "top_k", "limit")}
    settings["tokenizer"] = describe_tokenizer(student.tokenizer, with_template=False)
    for folder, paths in splits.items():
        losses: Counter = Counter()
        size = sum(file.stat().st_size for path in paths for file in files_of(path))
        with tqdm(total=size, unit="B", unit_scale=True, desc=folder, delay=1) as bar:
            write_shards(
                islice(items(paths, bar, losses), config.limit),
                lambda batch: encode(batch, answers_of(batch), config),
                folder,
                fingerprint={"kind": KIND, "inputs": describe_inputs(paths, folder), **settings, **source},
                shard_size=config.shard_size or (256 if config.top_k else 8),
                overwrite=config.overwrite,
                read_counts=losses,
                on_shard=lambda counts: bar.set_postfix(rows=counts["rows"], refresh=False),
            )
        found = read_manifest(folder)["statistics"]
        print(
            f"{folder}: {found['records']} records in {found['rows']} rows ({found['dropped']} dropped, "
            f"{found['truncated']} truncated, {found['no_text']} without text), {found['answer_tokens']} "
            f"answer tokens, {found['teacher_positions']} of them with a distribution"
            f"{describe_losses(losses, found['records'], lost=found['dropped'])}"
        )


if __name__ == "__main__":
    run_main(main)
