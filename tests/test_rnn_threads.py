"""The recurrent family on any number of threads, wherever it is called from: the same bits, and nobody waits forever.

Slices of a layer wait for each other, so a slice that no thread serves would hold up all. What could bring that about
runs in a process of its own with a watchdog: where it still waits when the time is up, it says at which line, and the
test fails. Each program calls two stacks whose layers are cut into more slices than it has threads to serve them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import rnn_cases as rc
import torch
from rnn_cases import Case
from test_norm_properties import assert_same_bits

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]

WATCHDOG = 60  # seconds after which what waits for a lost thread is given up


def with_watchdog(function: Callable[[], object]) -> None:
    """Runs function in a thread; a deadlock fails the test instead of holding it up."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(WATCHDOG)
    assert not thread.is_alive(), f"still waiting after {WATCHDOG} s"
    if failed:
        raise failed[0]


# ---- in this process -------------------------------------------------------------------------------------------------

LARGE = [
    Case("LSTM", (9, 3, 40, 150), layers=2, bidirectional=True, states=True),
    Case("GRU", (12, 1, 30, 260), states=True),
    Case("RNN_TANH", (6, 40, 33, 100), lengths=tuple(range(1, 7)) * 6 + (0, 3, 6, 2), bidirectional=True),
    Case("LSTM", (5, 9, 20, 96), proj=33, dtype=torch.bfloat16),
    Case("LSTM", (5, 9, 20, 150), proj=70, bidirectional=True, options=(("layer_norm", True),)),
    Case("LSTM", (1, 3, 20, 150), options=(("layer_norm", True),)),
]


@pytest.mark.cases(LARGE)
def test_same_bits_for_any_number_of_threads(isa: str, case: Case) -> None:
    t = rc.tensors(case)
    torch.set_num_threads(1)
    expected = rc.results(case, t)

    def check() -> None:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(rc.results(case, t), expected)

    with_watchdog(check)


def test_calls_from_several_python_threads(isa: str) -> None:
    """Also with fewer threads to spare than each call asks for."""
    inputs = [rc.tensors(LARGE[0], draw) for draw in range(3)]
    expected = [rc.results(LARGE[0], t) for t in inputs]

    def check() -> None:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda t: rc.results(LARGE[0], t), inputs * 2))
        for actual, wanted in zip(found, expected * 2, strict=True):
            assert_same_bits(actual, wanted)

    with_watchdog(check)


# ---- in a process of its own -----------------------------------------------------------------------------------------

# What every program begins with. same() is whether outputs and every gradient have the bits that one thread gave.
PRELUDE = """
import ctypes, os, threading
from concurrent.futures import ThreadPoolExecutor
import torch, handtuned

torch.manual_seed(0)
stacks = [handtuned.nn.LSTM(20, 200, 2, bidirectional=True), handtuned.nn.GRU(20, 300, layer_norm=True)]
x = torch.randn(10, 2, 20)


def results():
    found = []
    for stack in stacks:
        leaf = x.clone().requires_grad_()
        output, _ = stack(leaf)
        found += [output.detach(), *torch.autograd.grad(output.square().sum(), [leaf, *stack.parameters()])]
    return found


def same():
    return all(a.equal(b) for a, b in zip(results(), expected, strict=True))


torch_cpu = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))


def in_region(pieces, body):
    # body(i) for each of the pieces, in a region of torch's pool
    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def run(begin, end, context):
        for i in range(begin, end):
            body(i)

    size = ctypes.c_int64
    assert torch_cpu.torch_parallel_for(size(0), size(pieces), size(1), run, None) == 0


torch.set_num_threads(1)
expected = results()
"""


def run_watched(program: str, seconds: float = WATCHDOG, **environment: str) -> str:
    """What it printed. Where time is up it and its children are ended, after it has said where its threads are."""
    watch = f"import faulthandler\nfaulthandler.dump_traceback_later({seconds - 0.5})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", watch + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still waiting after {seconds} s, at\n{process.communicate()[1]}", pytrace=False)
    assert process.returncode == 0, errors
    return printed


def run_program(program: str, **environment: str) -> str:
    return run_watched(PRELUDE + program, **environment)


def test_the_watchdog_bites() -> None:
    """Also where the one that waits is a child, whose end the parent awaits."""
    program = """
import os, time
def waits_forever(child):
    time.sleep(1000) if child == 0 else os.waitpid(child, 0)
waits_forever(os.fork())
"""
    with pytest.raises(pytest.fail.Exception, match=r"(?s)still waiting after 1.5 s, at.*waits_forever"):
        run_watched(program, 1.5)


def test_more_threads_than_the_machine_has() -> None:
    program = """
for threads in (2, 7, 16, 100):
    torch.set_num_threads(threads)
    assert same(), threads
print("same")
"""
    assert run_program(program) == "same\n"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_fewer_threads_than_asked_for(limit: int) -> None:
    """The program counts that the pool has no more than `limit`, whatever it is asked for."""
    program = """
for threads in (8, 16):
    torch.set_num_threads(threads)
    served = set()
    in_region(threads, lambda i: served.add(threading.get_native_id()))
    print(torch.get_num_threads(), len(served), same())
"""
    found = run_program(program, OMP_THREAD_LIMIT=str(limit), OMP_NUM_THREADS="1")
    assert found == f"8 {limit} True\n16 {limit} True\n"


@pytest.mark.parametrize("levels", ["1", "4"])
def test_inside_a_parallel_region(levels: str) -> None:
    """Every thread of a region of torch's pool calls the layers, whether OpenMP may open regions within or not."""
    program = """
torch.set_num_threads(3)
found = []
in_region(9, lambda i: found.append((threading.get_native_id(), same())))
print(len({thread for thread, _ in found}), [equal for _, equal in found].count(True))
print(same())
"""
    assert run_program(program, OMP_MAX_ACTIVE_LEVELS=levels) == "3 9\nTrue\n"


def test_inside_python_threads_of_changing_counts() -> None:
    """Six threads at once, each of which asks for another number of threads before every call."""
    program = """
def calls(first):
    found = []
    for i in range(6):
        torch.set_num_threads(1 + (first + i) % 6)
        found.append(same())
    return all(found)

with ThreadPoolExecutor(6) as pool:
    print(*pool.map(calls, range(6)))
torch.set_num_threads(2)
print(same())
"""
    assert run_program(program) == "True True True True True True\nTrue\n"


def test_inside_the_threads_of_torch_jit_fork() -> None:
    """torch's pool between operators: as many calls at once as it has threads, each with a team of its own."""
    program = """
import warnings

warnings.simplefilter("ignore")  # torch.jit is deprecated
torch.set_num_interop_threads(4)
torch.set_num_threads(3)
packed = handtuned.nn.functional.pack_rnn_weights("LSTM", stacks[0]._flat_weights, bidirectional=True)

def call(x, packed):
    return torch.ops.handtuned.rnn_inference(x, None, None, None, packed, "LSTM", 200, 0, 2, True)[0]

def calls(x, packed):
    futures = [torch.jit.fork(call, x, packed) for _ in range(12)]
    return [torch.jit.wait(future) for future in futures]

traced = torch.jit.trace(calls, (x, packed))
assert str(traced.graph).count("= prim::fork") == 12
with torch.no_grad():
    print([y.equal(expected[0]) for y in traced(x, packed)].count(True), flush=True)
os._exit(0)  # at exit torch may end its threads between operators in the middle, and abort
"""
    assert run_program(program) == "12\n"


# ---- after a fork ----------------------------------------------------------------------------------------------------

# child(body) is the exit status of a forked process in which body() held.
CHILD = """
def child(body):
    process = os.fork()
    if process == 0:
        held = False
        try:
            held = body()
        finally:
            os._exit(0 if held else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""


def test_after_a_fork() -> None:
    """A child has none of its parent's threads. Where the parent has used no pool, it opens one of its own."""
    program = """
def with_three():
    torch.set_num_threads(3)
    return same()

print(child(same), child(with_three), same())
"""
    assert run_program(CHILD + program) == "0 0 True\n"


def test_after_a_fork_of_one_that_used_its_pool() -> None:
    """libgomp itself never returns where such a child's main thread opens a region: it takes one, as DataLoader's
    workers do, or calls from a thread of its own, which has a pool of its own. The parent goes on."""
    program = """
def with_one():
    torch.set_num_threads(1)
    return same()

def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.set_num_threads, 3).result()
        return pool.submit(same).result()

torch.set_num_threads(3)
assert same()
print(child(with_one), child(in_a_thread), same())
"""
    assert run_program(CHILD + program) == "0 0 True\n"


def test_in_the_workers_of_a_data_loader() -> None:
    program = """
class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return same()

torch.set_num_threads(2)
assert same()
loader = torch.utils.data.DataLoader(Set(), batch_size=1, num_workers=2)
print([bool(batch.all()) for batch in loader].count(True), same())
"""
    assert run_program(program) == "4 True\n"
