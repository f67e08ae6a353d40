"""pass@1 of generated Python: the program and its tests run in a sandbox (llada/rewards/sandbox.py)."""

from typing import Any

from llada.data.final_answer import code_blocks
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


def extract_function(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Programs from chat answers: the block that defines the function, after the prompt's own imports."""
    return [
        [doc["prompt"].split("\ndef ")[0] + "\n" + _code(text, doc) for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def _code(text: str, doc: dict[str, Any]) -> str:
    blocks = code_blocks(text) or [text]
    for block in blocks:
        if f"def {doc['entry_point']}" in block:
            return block
    return doc["prompt"] + blocks[0]  # the body alone, to be put under the signature
