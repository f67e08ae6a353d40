"""Programs that models write stay within their limits, and so do verifiers that look at what models write."""

import os
import time

import pytest

from llada.rewards.sandbox import ConfinedModule, on_all_cores, runs_through

HARM = os.path.join(os.path.dirname(__file__), "harm")
HARMFUL = {
    "ends early": "exit(0)",
    "ends hard": "import os; os._exit(0)",
    "fails": "assert 1 == 2",
    "is no program": "def f(:",
    "forks": "import os\nwhile True: os.fork()",
    "leaves its session": "import os\nif os.fork() == 0: os.setsid()",
    "starts threads": "import threading\nthreading.Thread(target=print).start()",
    "takes memory": "x = bytearray(2**32)",
    "fills the disk": "open('big', 'wb').write(bytes(2**24))",
    "writes where it should not": f"open({HARM!r}, 'w').write('x')",
    "reads the environment": "import os\nassert os.environ.get('PYTEST_CURRENT_TEST')",
    "is huge": "x = '" + "a" * 300_000 + "'\nassert not x",
    "holds half a character": "x = '\ud800'\nassert not x",
}


def test_a_program_passes_when_it_runs_to_its_last_line():
    assert (
        on_all_cores(runs_through, ["x = 1", "import math\nassert math.pi > 3", "open('a', 'w').write('x')"])
        == [True] * 3
    )
    assert runs_through("print('x' * 10**6)")


def test_harmful_programs_fail_and_leave_nothing_behind():
    if os.geteuid() != 0:  # only another user's files are out of reach
        HARMFUL.pop("writes where it should not")
    started = time.monotonic()
    assert on_all_cores(runs_through, HARMFUL.values()) == [False] * len(HARMFUL)
    assert time.monotonic() - started < 20
    assert not os.path.exists(HARM)


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: pass"])
def test_time_is_limited(program):
    started = time.monotonic()
    assert not runs_through(program, seconds=0.5)
    assert time.monotonic() - started < 3


def test_a_worker_survives_calls_that_do_not_end():
    worker = ConfinedModule("llada.rewards.verifiers", prepare="import_libraries")
    puzzle = {"answer": "", "metadata": {"numbers": [6, 61, 94, 4], "target": 309}}
    assert worker.call("reasoning_gym", "countdown", "94*4 - 61 - 6", puzzle) == 1.0
    endless = worker.call("reasoning_gym", "countdown", "9**9**9**9", puzzle, seconds=0.5, failed=0.0)
    assert endless == 0.0
    # reasoning-gym evaluates a countdown answer; a process that may start none cannot be told to
    harm = "__import__('os').system('touch harm') or 309"
    assert worker.call("reasoning_gym", "countdown", harm, puzzle, failed=0.0) < 1.0
    assert worker.call("reasoning_gym", "countdown", "exit()", puzzle, failed=0.0) < 1.0
    with pytest.raises(ValueError, match="no_such_task"):
        worker.call("reasoning_gym", "no_such_task", "1", puzzle)
    assert worker.call("no_such_function", failed="failed") == "failed"
    worker.close()
