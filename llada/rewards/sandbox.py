"""Untrusted answers are judged here: in processes of their own, with limits.

A confined process has no environment variables, a temporary working folder, and limits on time, memory and
file size; it cannot start processes or threads, and a root process gives its identity up. That contains
accidents, endless loops, fork bombs and stray files. It does not keep a program from reading files or from
the network: run untrusted models in a container.
"""

import importlib
import inspect
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

SECONDS = 10.0
MEMORY = 2**30  # bytes of address space
FILE_SIZE = 2**20  # bytes, of a written file and of a reply
MODULE_MEMORY = 2**32  # of address space: sympy and numpy map far more than they use


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
        os.setgroups([])  # before the ids: afterwards it is not allowed
        os.setgid(nobody)
        os.setuid(nobody)
        version_3, may_read = 0x20080522, 1 << 2
        header = (ctypes.c_uint32 * 2)(version_3, 0)
        # two triples of 32 bits: effective, permitted, inheritable
        libc.capset(header, (ctypes.c_uint32 * 6)(may_read, may_read, 0, 0, 0, 0))
    for name, limit in {
        "NPROC": 0,  # of processes and threads alike: BLAS must be told to have one
        "AS": memory,
        "FSIZE": file_size,
        "CORE": 0,
        **({"CPU": cpu_seconds} if cpu_seconds else {}),
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


# What a program's process runs: a line with a word and the limits, the program behind it, the word back.
_RUN = f"""{inspect.getsource(confine)}
def run():
    import os, sys
    word, memory, file_size, seconds = sys.stdin.buffer.readline().decode().split()
    program = compile(sys.stdin.buffer.read(), "program.py", "exec")
    reply = os.dup(1)
    os.set_inheritable(reply, False)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    confine(int(memory), int(file_size), int(seconds))
    exec(program, {{"__name__": "__main__"}})
    os.write(reply, word.encode())
    os._exit(0)
run()
"""


@contextmanager
def _process(code: str) -> Iterator[subprocess.Popen]:
    """A fresh interpreter that runs `code` in an empty folder; it and its session end with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            cwd=folder,
            env={"PATH": "", "HOME": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # the session, of which it is the leader
            child.wait()
            for stream in (child.stdin, child.stdout):
                with suppress(OSError):  # what was not sent yet is lost with the process
                    stream.close()


def runs_through(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program runs to its last line, in time and without an error."""
    # A word it could not know is sent back at its end: a program that calls exit(0) has passed no test.
    word = secrets.token_hex(16)
    request = f"{word} {memory} {FILE_SIZE} {max(1, round(seconds))}\n{program}"
    with _process(_RUN) as child:
        try:
            reply, _ = child.communicate(request.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return child.returncode == 0 and reply == word.encode()


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of each item, in threads: one for each of this rank's CPU cores."""
    # More programs at a time than cores would run good ones out of their time.
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, len(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as pool:
        return list(pool.map(function, items))


class ConfinedModule:
    """A process, confined for good, in which the functions of one of our modules are called.

    It starts at the first call. A call that takes too long, or kills the process, gives `failed`, and the
    next call gets a new process. Calls from several threads wait for each other.
    """

    def __init__(self, module: str, *, prepare: str | None = None) -> None:
        """`prepare` names a function of the module that imports what its calls need, before the limits."""
        self._arguments = f"{module!r}, {prepare!r}, {MODULE_MEMORY}"
        self._child: subprocess.Popen | None = None
        self._life = ExitStack()
        self._lock = threading.Lock()

    def call(self, function: str, *arguments: Any, seconds: float = SECONDS, failed: Any = None) -> Any:
        """What the function gives for arguments that JSON can say.

        ValueError if the function raised one; any other error is a failed call.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            reply = None
            with suppress(OSError):
                self._child.stdin.write(json.dumps([function, list(arguments)]).encode() + b"\n")
                self._child.stdin.flush()
                reply = self._read(seconds)
            if reply is None:
                self.close()
                return failed
        if reply.get("error") is not None:
            raise ValueError(reply["error"])
        return reply.get("value", failed)

    def _start(self) -> None:
        self.close()
        path = [os.path.abspath(folder) for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve; serve({self._arguments})"
        self._child = self._life.enter_context(_process(code))
        if self._read(120.0) is None:  # the module's imports
            self.close()
            raise RuntimeError(f"the process for ({self._arguments}) does not start")

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
        with suppress(ValueError):
            return json.loads(data)
        return None

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        self._life.close()
        self._child = None

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit the modules this needs may be gone
            self.close()


def serve(module: str, prepare: str | None, memory: int) -> None:
    """In the process: imports the module, confines itself, and answers calls until its input ends."""
    # Replies are JSON, never pickles: whoever takes this process over must not reach the one that reads them.
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
