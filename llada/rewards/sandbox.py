"""Untrusted answers are judged here: in processes of their own, with limits.

`runs_through` runs a program that a model wrote. `Worker` calls functions of ours that look at what a model
wrote with libraries that could hang on it, or evaluate it (sympy).

A confined process has no environment variables, a temporary working folder, and limits on time, memory and
file size; it cannot start processes or threads, and a root process gives its identity up. That contains
accidents, endless loops, fork bombs and stray files. It does not keep a program from reading files or from
the network: run untrusted models in a container.
"""

import inspect
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 10.0
MEMORY = 2**30
FILE_SIZE = 2**20
WORKER_MEMORY = 2**32  # of address space: sympy and numpy map far more than they use


def confine(memory: int, file_size: int, cpu_seconds: int) -> None:
    """Limits the calling process for good; 0 CPU seconds: no such limit.

    Its text is also what a program's process begins with, so it imports what it needs itself.
    """
    import ctypes
    import os
    import resource

    if os.geteuid() == 0:
        # Another user, who may start nothing and write nowhere; root itself is exempt from RLIMIT_NPROC.
        # Reading stays allowed (CAP_DAC_READ_SEARCH, bit 2), for Python itself may live in root's folder.
        nobody, libc = 65534, ctypes.CDLL(None, use_errno=True)
        os.chown(".", nobody, nobody)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
        version_3, may_read = 0x20080522, 1 << 2
        header = (ctypes.c_uint32 * 2)(version_3, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)(may_read, may_read, 0, 0, 0, 0))
    for name, limit in {
        "NPROC": 0,
        "AS": memory,
        "FSIZE": file_size,
        "CORE": 0,
        **({"CPU": cpu_seconds} if cpu_seconds else {}),
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


# What a program's process runs: a word on standard input, the limits, the program, the word back.
_RUN = f"""{inspect.getsource(confine)}
def run():
    import os, sys
    word, memory, file_size, seconds = sys.stdin.buffer.readline().decode().split()
    reply = os.dup(1)
    os.set_inheritable(reply, False)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    with open("program.py", "rb") as file:
        program = compile(file.read(), "program.py", "exec")
    confine(int(memory), int(file_size), int(seconds))
    exec(program, {{"__name__": "__main__"}})
    os.write(reply, word.encode())
    os._exit(0)
run()
"""


def runs_through(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program runs to its last line, in time and without an error.

    It then sends back a word that it was given: a program that calls exit(0) has not passed its tests.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_bytes(program.encode("utf-8", "replace"))
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUN],
            cwd=folder,
            env={"PATH": "", "HOME": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        request = f"{word} {memory} {FILE_SIZE} {max(1, round(seconds))}\n".encode()
        try:
            answer, _ = child.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        return child.returncode == 0 and answer == word.encode()


def all_run_through(
    programs: Sequence[str], *, seconds: float = SECONDS, num_workers: int | None = None
) -> list[bool]:
    """`runs_through` of each program, several at a time."""
    with ThreadPoolExecutor(num_workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: runs_through(program, seconds=seconds), programs))


def _end(child: subprocess.Popen) -> None:
    """Ends the child and whoever belongs to its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


class Worker:
    """A confined process that calls the functions of one of our modules with JSON arguments.

    It starts at the first call. A call that takes too long, or kills the process, gives `failed`, and the
    next call gets a new process. Calls from several threads wait for each other.
    """

    def __init__(self, module: str, *, prepare: str | None = None, memory: int = WORKER_MEMORY) -> None:
        """`prepare` names a function of the module that imports what its calls need, before the limits."""
        self._module, self._prepare, self._memory = module, prepare, memory
        self._child: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._lock = threading.Lock()

    def call(self, function: str, *arguments: Any, seconds: float = SECONDS, failed: Any = None) -> Any:
        """What the function gives.

        Raises:
            ValueError: the function raised one; any other error is a failed call.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            line = json.dumps([function, list(arguments)])
            try:
                self._child.stdin.write(line.encode() + b"\n")
                self._child.stdin.flush()
            except OSError:
                self.close()
                return failed
            reply = self._read(seconds)
            if reply is None:
                self.close()
                return failed
        if reply.get("error") is not None:
            raise ValueError(reply["error"])
        return reply.get("value", failed)

    def _start(self) -> None:
        self.close()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        code = (
            f"import sys; sys.path[:] = {[os.path.abspath(p) for p in sys.path]!r}; "
            "from llada.rewards.sandbox import serve; "
            f"serve({self._module!r}, {self._prepare!r}, {self._memory})"
        )
        self._child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self._folder.name,
            env={"PATH": "", "HOME": self._folder.name, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._read(120.0) is None:  # the module's imports
            self.close()
            raise RuntimeError(f"the verifier process of {self._module} does not start")

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """One line of the process as JSON; None if none comes in time."""
        data, deadline = b"", time.monotonic() + seconds
        output = self._child.stdout.fileno()
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(output, 65536) if ready else b""
            if not chunk or len(data) > FILE_SIZE:
                return None
            data += chunk
        try:
            return json.loads(data)
        except ValueError:
            return None

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        if self._child is not None:
            _end(self._child)
            self._child = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit the modules this needs may be gone
            self.close()


def serve(module: str, prepare: str | None, memory: int) -> None:
    """The worker's side: imports the module, confines itself, and answers calls until its input ends."""
    import importlib

    requests, reply = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for stream in (0, 1, 2):  # what a library prints is no answer
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    functions = importlib.import_module(module)
    if prepare is not None:
        getattr(functions, prepare)()
    confine(memory, FILE_SIZE, 0)

    def send(value: dict[str, Any]) -> None:
        reply.write(json.dumps(value).encode() + b"\n")
        reply.flush()

    send({"value": "ready"})
    for line in requests:
        name, arguments = json.loads(line)
        try:
            send({"value": getattr(functions, name)(*arguments)})
        except ValueError as error:
            send({"error": str(error)})
        except (Exception, RecursionError, MemoryError):
            send({})
