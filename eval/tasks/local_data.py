"""Data of the local tasks: files in the folder that LLADA_EVAL_DATA (or --metadata data_dir=...) names.

    gsm8k/train.jsonl, gsm8k/test.jsonl   {"question", "answer"} a line, as in openai/grade-school-math
    humaneval/HumanEval.jsonl.gz          as in openai/human-eval; HumanEval.jsonl also does
    humaneval_infilling/HumanEval-SingleLineInfilling.jsonl.gz, -MultiLineInfilling, -RandomSpanInfilling,
    -RandomSpanInfillingLight             as in openai/human-eval-infilling; .jsonl also does
    mmlu/dev/*.csv, mmlu/test/*.csv       question,A,B,C,D,answer without a header, a file per subject
    mmlu/dev.jsonl, mmlu/test.jsonl       or {"question", "choices", "answer", "subject"} a line

lm_eval calls the functions with everything in --metadata and --model_args; what is not theirs is ignored.
"""

import csv
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from lm_eval.api.samplers import ContextSampler

from llada.data.records import read_records

VARIABLE = "LLADA_EVAL_DATA"


def data_file(names: list[str], data_dir: str | None) -> Path:
    """The first of the files or folders `names` that exists; ValueError if none does."""
    folder = data_dir or os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(
            f"set {VARIABLE} to the folder that holds {names[0]}, or give --metadata data_dir=FOLDER"
        )
    for name in names:
        if (path := Path(folder) / name).exists():
            return path
    raise ValueError(f"{VARIABLE}={folder}: has no {' or '.join(names)}")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz; ValueError names the line that is not one."""
    return [record for _, record in read_records(str(path))]


def gsm8k(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Splits train (for few-shot examples) and test."""
    return DatasetDict(
        {
            split: Dataset.from_list(read_jsonl(data_file([f"gsm8k/{split}.jsonl"], data_dir)))
            for split in ("train", "test")
        }
    )


def humaneval(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Split test, 164 problems; from the hub where no folder of local data is given."""
    if not (data_dir or os.environ.get(VARIABLE)):
        return load_dataset("openai/openai_humaneval")
    path = data_file(["humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"], data_dir)
    return DatasetDict({"test": Dataset.from_list(read_jsonl(path))})


INFILLING = ("SingleLine", "MultiLine", "RandomSpan", "RandomSpanLight")


def humaneval_infilling(*, data_dir: str | None = None, holes: str = INFILLING[0], **_: Any) -> DatasetDict:
    """Split test; `holes` names the kind of text that is missing (--metadata holes=MultiLine)."""
    if holes not in INFILLING:
        raise ValueError(f"--metadata holes={holes}: choose from {', '.join(INFILLING)}")
    # the light set is named behind the word: HumanEval-RandomSpanInfillingLight
    name = f"HumanEval-{holes.removesuffix('Light')}Infilling{'Light' * holes.endswith('Light')}.jsonl"
    path = data_file([f"humaneval_infilling/{name}.gz", f"humaneval_infilling/{name}"], data_dir)
    return DatasetDict({"test": Dataset.from_list(read_jsonl(path))})


def mmlu(*, data_dir: str | None = None, subject: str | None = None, **_: Any) -> DatasetDict:
    """One split, all, of question, choices, answer (0 to 3), subject, and split (dev or test).

    `subject` keeps only this one (--metadata subject=anatomy).
    """
    # lm_eval tells a few-shot sampler which question it is for only when both come from one split; without
    # that the examples could not be of the question's subject
    records = []
    for split in ("dev", "test"):
        rows = _mmlu_records(data_file([f"mmlu/{split}", f"mmlu/{split}.jsonl"], data_dir), split)
        if subject is not None:
            subjects = sorted({row["subject"] for row in rows})
            rows = [row for row in rows if row["subject"] == subject]
            if not rows:
                raise ValueError(f"--metadata subject={subject}: {split} has only {', '.join(subjects)}")
        records += [{**row, "split": split} for row in rows]
    return DatasetDict({"all": Dataset.from_list(records)})


def mmlu_test(docs: Dataset) -> Dataset:
    """The questions that count."""
    return docs.filter(lambda doc: doc["split"] == "test")


def mmlu_dev(docs: Dataset) -> Dataset:
    """The questions that serve as examples."""
    return docs.filter(lambda doc: doc["split"] == "dev")


def _mmlu_records(path: Path, split: str) -> list[dict[str, Any]]:
    if path.is_file():
        return [
            {**record, "answer": _letter(record["answer"], f"{path}:{n}")}
            for n, record in enumerate(read_jsonl(path), start=1)
        ]
    records = []
    for file in sorted(path.glob("*.csv")):
        with open(file, encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                if len(row) != 6:
                    raise ValueError(
                        f"{file}:{number}: expected question,A,B,C,D,answer, got {len(row)} fields"
                    )
                answer = _letter(row[5], f"{file}:{number}")
                subject = file.stem.removesuffix(f"_{split}")
                records.append(
                    {"question": row[0], "choices": row[1:5], "answer": answer, "subject": subject}
                )
    return records


def _letter(answer: str | int, where: str) -> int:
    if answer in (0, 1, 2, 3):
        return answer
    if str(answer).strip() in ("A", "B", "C", "D"):
        return "ABCD".index(str(answer).strip())
    raise ValueError(f"{where}: 'answer' must be A to D or 0 to 3, got {answer!r}")


class SameSubject(ContextSampler):
    """The first few-shot examples of the question's own subject, in their order, as MMLU prescribes."""

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None, df: Any = None) -> list[dict[str, Any]]:
        pool = [doc for doc in df or self.df if eval_doc is None or doc["subject"] == eval_doc["subject"]]
        if len(pool) < n:
            raise ValueError(
                f"--num_fewshot {n}: a subject has only {len(pool)} questions in dev: {pool[:1]}"
            )
        return pool[:n]
