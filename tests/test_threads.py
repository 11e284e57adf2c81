"""Every family from several threads and processes at once: the bits of a call alone, no crash, no deadlock.

Each program runs in a process of its own with a watchdog (test_rnn_threads.py, which has what is the recurrent layers'
alone). What they call is in thread_subjects.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_rnn_threads import CHILD, run_watched

WATCHDOG = 240  # seconds: on a busy machine threads wait long for one that is not served
TESTS = str(Path(__file__).parent)
PRELUDE = f"""
import os, sys
sys.path.insert(0, {TESTS!r})
import signal, threading, time, warnings
warnings.simplefilter("ignore")
from concurrent.futures import ThreadPoolExecutor
import handtuned, torch
import thread_subjects as ts
from handtuned.nn import functional as H
"""
SAME = """
expected = ts.by_one_thread()


def same(names=ts.NAMES):
    return all(ts.same(name, expected) for name in names)
"""


def run_program(program: str) -> str:
    return run_watched(PRELUDE + program, WATCHDOG)


def test_python_threads_of_changing_counts() -> None:
    """Four threads: at first all in the same family, whose packed weights nobody has made yet, then in unlike ones.
    Each asks for another number of threads before every call."""
    program = """
meet = threading.Barrier(4)

def calls(first):
    found = []
    for i, name in enumerate(ts.NAMES):
        torch.set_num_threads(1 + (first + i) % 4)
        meet.wait()
        found.append(same([name]))
    for i in range(len(ts.NAMES)):
        torch.set_num_threads(1 + (first + i) % 3)
        found.append(same([ts.NAMES[(2 * first + i) % len(ts.NAMES)]]))
    return all(found)

with ThreadPoolExecutor(4) as pool:
    print(*pool.map(calls, range(4)))
torch.set_num_threads(2)
print(same(), torch.get_num_threads(), len(os.listdir("/proc/self/task")) > 1)
"""
    assert run_program(SAME + program) == "True True True True\nTrue 2 True\n"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    """Also of a parent that has used its pool, and goes on using it."""
    program = f"""
torch.set_num_threads(2)
assert same()
workers = dict(num_workers=1 if "{start}" == "spawn" else 2, multiprocessing_context="{start}")
loader = torch.utils.data.DataLoader(ts.Calls(expected), batch_size=3, **workers)
print(all(bool(batch.all()) for batch in loader), same())
"""
    assert run_program(SAME + program) == "True True\n"


def test_fork_while_another_thread_computes() -> None:
    """What that thread holds at this moment is nobody's in the child: a lock would hold it up."""
    program = """
stop, found = threading.Event(), []

def computes():
    while not stop.is_set():
        found.append(same())

def with_two():
    torch.set_num_threads(2)
    return same()

torch.set_num_threads(1)  # the main thread has no pool yet: test_rnn_threads.py
thread = threading.Thread(target=computes)
thread.start()
statuses = []
for i in range(3):
    time.sleep(0.013 * i)
    statuses.append(child(with_two))
stop.set()
thread.join()
print(statuses, all(found), with_two())
"""
    assert run_program(SAME + CHILD + program) == "[0, 0, 0] True True\n"


def test_interrupts() -> None:
    """Ctrl-C in the middle of long calls, and anywhere in a training step: KeyboardInterrupt when the call is over.
    What was begun is no part of what comes later."""
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
q = torch.randn(1, 1, 1 << 13, 64)
x, steps, lstm = torch.randn(1 << 12, 512), torch.randn(300, 8, 16), handtuned.nn.LSTM(16, 256)

def interrupted(call, seconds=0.05):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))  # a thread that runs during the call
    try:
        timer.start()
        while True:
            call()
    except KeyboardInterrupt:
        return True

def attention():
    with torch.no_grad():
        H.scaled_dot_product_attention(q, q, q)

torch.set_num_threads(2)
long = [attention, lambda: H.linear(x, x), lambda: lstm(steps)[0].sum().backward()]
print([interrupted(call) for call in long], same())
ts.forget_packed_weights()
print([interrupted(same, 0.011 * i) for i in range(1, 9)].count(True), same())
"""
    assert run_program(SAME + program) == "[True, True, True] True\n8 True\n"


def test_exit_during_calls() -> None:
    """The interpreter ends, with its statics and torch's, while three threads compute for longer than that takes."""
    program = """
q, steps, lstm = torch.randn(1, 2, 1 << 17, 64), torch.randn(20000, 16, 16), handtuned.nn.LSTM(16, 512)
x, w, target = torch.randn(1 << 13, 2048), torch.randn(1 << 15, 2048), torch.zeros(1 << 13, dtype=torch.int64)
long = [
    lambda: H.scaled_dot_product_attention(q, q, q),
    lambda: H.linear_cross_entropy(x, w, target),
    lambda: lstm(steps),
]
meet = threading.Barrier(4)

@torch.no_grad()
def calls(call):
    torch.set_num_threads(2)
    meet.wait()
    call()
    print("returned")

for call in long:
    threading.Thread(target=calls, args=[call], daemon=True).start()
meet.wait()
time.sleep(0.1)
print("exits")
"""
    assert run_program(program) == "exits\n"


def test_exit_waits_for_threads_that_are_no_daemons() -> None:
    program = """
def calls():
    for _ in range(3):
        found = same()
    print(found)

threading.Thread(target=calls).start()
"""
    assert run_program(SAME + program) == "True\n"
