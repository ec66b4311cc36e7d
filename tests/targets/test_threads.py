"""The thread pool that is linked into CPU libraries: targets/cpu/threads.c."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.script import ir as I
from tvm.script import tirx as T

from llmc.errors import UsageError
from llmc.runtime.devices import cpu
from llmc.targets.cpu.target import CpuTarget

TASKS_PER_THREAD = 8  # in threads.c


@I.ir_module
class Kernels:
    @T.prim_func(s_tir=True)
    def count(x: T.handle):
        """Adds one to every element: each turn of the loop has to be taken once."""
        T.func_attr({"global_symbol": "count"})
        n = T.int64()
        X = T.match_buffer(x, (n,), "int32")
        for i in T.parallel(n):
            with T.sblock("count"):
                v = T.axis.spatial(n, i)
                X[v] = X[v] + 1

    @T.prim_func(s_tir=True)
    def square(x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "square"})
        n = T.int64()
        X = T.match_buffer(x, (n,), "float32")
        Y = T.match_buffer(y, (n,), "float32")
        for i in T.parallel(n):
            with T.sblock("square"):
                v = T.axis.spatial(n, i)
                Y[v] = X[v] * X[v]

    @T.prim_func(s_tir=True)
    def check(x: T.handle):
        T.func_attr({"global_symbol": "check"})
        n = T.int64()
        X = T.match_buffer(x, (n,), "int32")
        for i in T.parallel(n):
            assert X[i] >= 0, "a value is negative"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = CpuTarget()
    path = tmp_path_factory.mktemp("threads") / target.library_name
    target.link(tvm.compile(Kernels, target=target.tvm_target), path)
    return path


@pytest.fixture
def module(library: Path):
    loaded = tvm_ffi.load_module(str(library))
    loaded["llmc_set_threads"](4)
    yield loaded
    loaded["llmc_set_threads"](1)


LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Environment(ctypes.Structure):
    _fields_ = (("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32))


def num_task(environment: int) -> int:
    return _Environment.from_address(environment).num_task


@pytest.fixture
def launch(library: Path, module):
    """The pool's launch, for lambdas written in Python."""
    function = ctypes.CDLL(str(library)).llmc_parallel_launch

    def call(body, tasks: int = 0) -> int:
        return function(LAMBDA(body), None, tasks)

    return call


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_turn_of_a_loop_is_taken_once(module, threads) -> None:
    """Loops shorter and longer than the number of tasks, launched back to back."""
    module["llmc_set_threads"](threads)
    for length in [1, 2, 3, 5, 7, 8, 9, 27, 28, 29, 64, 1000, 4097]:
        counts = np.zeros(length, np.int32)
        for _ in range(200):
            module["count"](counts)
        assert (counts == 200).all(), length


def test_results_are_those_of_a_serial_loop(module) -> None:
    x = np.random.default_rng(0).standard_normal(100_003).astype(np.float32)
    y = np.empty_like(x)
    module["square"](x, y)
    np.testing.assert_array_equal(y, x * x)  # one rounding each: the same bits


def test_launches_after_a_pause_find_sleeping_workers(module) -> None:
    """Longer than the workers' spinning: they have to be woken."""
    counts = np.zeros(1000, np.int32)
    for _ in range(50):
        module["count"](counts)
        time.sleep(0.002)
    assert (counts == 50).all()


def test_two_python_threads_may_launch_at_once(module) -> None:
    arrays = [np.zeros(257, np.int32) for _ in range(2)]

    def repeat(array) -> None:
        for _ in range(3000):
            module["count"](array)

    callers = [threading.Thread(target=repeat, args=(array,)) for array in arrays]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert all((array == 3000).all() for array in arrays)


def test_there_are_several_tasks_a_thread_unless_the_launch_says_how_many(launch) -> None:
    for asked, expected in ((0, 4 * TASKS_PER_THREAD), (5, 5), (1, 1)):
        tasks: list[tuple[int, int]] = []

        def body(task, environment, _, tasks=tasks) -> int:
            tasks.append((task, num_task(environment)))
            return 0

        assert launch(body, asked) == 0
        assert sorted(tasks) == [(task, expected) for task in range(expected)]


def test_a_slow_thread_takes_fewer_tasks(launch) -> None:
    """A static split would give it a fourth of them, and all would wait for it."""
    slow = threading.get_native_id()
    takers: list[int] = []

    def body(*_) -> int:
        takers.append(threading.get_native_id())
        time.sleep(0.03 if takers[-1] == slow else 0.001)
        return 0

    assert launch(body) == 0
    assert len(takers) == 4 * TASKS_PER_THREAD
    assert takers.count(slow) < TASKS_PER_THREAD


def test_a_launch_inside_a_task_runs_on_the_thread_of_the_task(launch) -> None:
    inner: list[tuple[int, int]] = []

    def outer_body(_task, *_) -> int:
        here = threading.get_native_id()

        def inner_body(_task, *_) -> int:
            inner.append((here, threading.get_native_id()))
            return 0

        return launch(inner_body) or launch(inner_body, 3)

    assert launch(outer_body) == 0
    assert len(inner) == 4 * TASKS_PER_THREAD * (1 + 3)
    assert all(outer == own for outer, own in inner)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_code_of_a_task_that_fails_is_returned(module, launch, threads) -> None:
    module["llmc_set_threads"](threads)
    assert launch(lambda task, *_: 7 if task == 0 else 0) == 7
    assert launch(lambda *_: -1) == -1
    assert launch(lambda *_: 0) == 0  # a failure is forgotten with its launch


@pytest.mark.parametrize("threads", [1, 4])
def test_the_error_of_a_task_is_raised_where_it_was_launched(module, threads) -> None:
    """Errors are kept by thread, and the one that fails is seldom the launching one."""
    module["llmc_set_threads"](threads)
    values = np.ones(1000, np.int32)
    for wrong in range(0, 1000, 7):
        values[wrong] = -1
        with pytest.raises(Exception, match="a value is negative"):
            module["check"](values)
        values[wrong] = 1
    module["check"](values)


def test_the_number_of_threads_is_checked(module) -> None:
    for wrong in (0, -1, 1025, 2**40, 1.5, None):
        with pytest.raises(ValueError, match="1 to 1024"):
            module["llmc_set_threads"](wrong)


# What ends a process, copies it or counts its threads, in processes of their own.

_HEAD = """
    import ctypes, gc, os, sys, threading, time
    import numpy as np
    from llmc.runtime.tvm_runtime import tvm_ffi
    module = tvm_ffi().load_module(sys.argv[1], keep_module_alive=False)
    module["llmc_set_threads"](3)
    count = module["count"]
    def launches(times):
        counts = np.zeros(1000, np.int32)
        for _ in range(times):
            count(counts)
        assert (counts == times).all()
    launches(100)
"""


def run(library: Path, body: str) -> str:
    script = textwrap.dedent(_HEAD) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_ends_while_its_workers_spin_or_sleep(library) -> None:
    run(library, "")
    run(library, "time.sleep(0.1)")


def test_a_process_ends_while_another_thread_launches(library) -> None:
    run(
        library,
        """
        # Not by the FFI: a Python thread that ends in a C++ frame ends the process itself.
        launch = ctypes.CDLL(sys.argv[1]).llmc_parallel_launch
        body = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        def forever():
            while True:
                launch(body, None, 100_000)
        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.2)
        """,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_number_of_threads_can_change(library) -> None:
    run(
        library,
        """
        def num_workers():
            tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
            return sum(open(task).read().startswith("llmc-worker-") for task in tasks)
        for threads in (1, 3, 2, 4):
            module["llmc_set_threads"](threads)
            launches(1)
            deadline = time.monotonic() + 30
            while num_workers() != threads - 1:  # a worker takes its name when it first runs
                assert time.monotonic() < deadline, f"{num_workers()} workers of {threads} threads"
                time.sleep(0.001)
        """,
    )


def test_an_unloaded_library_leaves_no_threads_and_no_fork_handler(library) -> None:
    run(
        library,
        """
        del count, module
        gc.collect()
        with open("/proc/self/maps") as maps:
            assert sys.argv[1] not in maps.read()
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/comm") as comm:
                assert not comm.read().startswith("llmc-worker")
        if os.fork() == 0:
            os._exit(0)
        assert os.wait()[1] == 0
        """,
    )


def test_a_forked_child_has_workers_of_its_own(library) -> None:
    """Forked while another thread is in a launch, whose lock nobody in the child will release."""
    output = run(
        library,
        """
        stop = False
        def until_stopped():
            while not stop:
                launches(10)
        other = threading.Thread(target=until_stopped)
        other.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                launches(100)
                print(len(os.listdir("/proc/self/task")), flush=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stop = True
        other.join()
        launches(100)
        child = os.fork()
        if child == 0:
            sys.exit(0)  # the pool's own end, without the workers it had
        assert os.waitpid(child, 0)[1] == 0
        """,
    )
    assert output.split() == ["3"] * 20


# How many threads there are.


def test_the_environment_sets_the_number_of_threads(monkeypatch) -> None:
    monkeypatch.delenv("LLMC_NUM_THREADS", raising=False)
    assert cpu.num_threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LLMC_NUM_THREADS", " 3 ")
    assert cpu.num_threads() == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "٣", "1e2", "9" * 10_000])
def test_a_wrong_number_of_threads_is_an_error_with_a_hint(monkeypatch, text) -> None:
    monkeypatch.setenv("LLMC_NUM_THREADS", text)
    with pytest.raises(UsageError, match="LLMC_NUM_THREADS") as caught:
        cpu.num_threads()
    assert caught.value.hint
    assert len(caught.value.message) < 120
