"""pass@1 of generated Python: the program and its tests run in a sandbox (llada/rewards/sandbox.py)."""

from typing import Any

from llada.data.final_answer import code_blocks
from llada.rewards.functions import program_of
from llada.rewards.sandbox import on_all_cores, runs_through


def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
    """Share of the programs that pass: references are the tests, predictions the programs of each problem."""
    programs = [
        f"{program}\n\n{test}\n"
        for test, programs in zip(references, predictions, strict=True)
        for program in programs
    ]
    results = on_all_cores(runs_through, programs)
    return {"pass@1": sum(results) / len(results)}


def complete_function(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Programs from continuations of the prompt's function."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def fill_hole(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Programs from texts between the prompt and what stands behind the hole."""
    return [
        [doc["prompt"] + text + doc["suffix"] for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def extract_function(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Programs from chat answers: what defines the function, after what the prompt has before it."""
    return [[_program(text, doc) for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def _program(text: str, doc: dict[str, Any]) -> str:
    program = program_of(text, doc["entry_point"])
    if f"def {doc['entry_point']}" not in program:
        # the body alone, indented, goes under the signature
        return doc["prompt"] + [*code_blocks(text), text][0]
    return ("\n" + doc["prompt"]).split("\ndef ")[0] + "\n" + program
