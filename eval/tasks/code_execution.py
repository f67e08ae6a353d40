"""pass@1 of generated Python: the program and its tests run in a process of their own, with limits.

The child has no input, no environment variables, a temporary working folder, and limits on CPU time, wall
time, memory and file size. That stops accidents and endless loops, not an attacker: run untrusted
models in a container.
"""

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 2**30
FILE_SIZE = 2**20


def _limit() -> None:
    """In the child, before the program starts."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def runs_through(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether the program runs to its last line, in time and without an error.

    It then leaves a word in a file: a program that calls exit(0) has not passed its tests.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        proof = Path(folder) / "proof"
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{program}\nopen({str(proof)!r}, 'w').write({word!r})\n"],
            cwd=folder,
            env={"PATH": "", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_limit,
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        return status == 0 and proof.is_file() and proof.read_text() == word


def _end(child: subprocess.Popen) -> None:
    """Ends the child and whatever it started."""
    with suppress(ProcessLookupError):  # it has ended by itself and left nobody behind
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
    """Share of the programs that pass: references are the tests, predictions the programs of each problem."""
    results = [
        runs_through(f"{program}\n\n{test}\n")
        for test, programs in zip(references, predictions, strict=True)
        for program in programs
    ]
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
    blocks = re.findall(r"```(?:[Pp]ython)?[^\S\n]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL) or [text]
    for block in blocks:
        if f"def {doc['entry_point']}" in block:
            return block
    return doc["prompt"] + blocks[0]  # the body alone, to be put under the signature
