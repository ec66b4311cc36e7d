"""Recorded steps, against a stand-in for CUDA's runtime library that keeps a diary."""

import ctypes

import pytest

from llmc.errors import LlmcError
from llmc.runtime.devices import cuda_graph
from llmc.runtime.devices.cuda_graph import CudaGraphs


class Name:
    """cudaGetErrorName: ctypes gives functions attributes."""

    def __call__(self, code):
        return b"cudaErrorStreamCaptureInvalidated" if code == 901 else None


class FakeCudart:
    """Succeeds, unless `failing` says otherwise; streams and graphs are numbered from 7."""

    def __init__(self):
        self.diary = []
        self.failing = {}
        self.cudaGetErrorName = Name()
        self._next = 7

    def __getattr__(self, name):
        def call(*arguments):
            shown = [a.value if isinstance(a, ctypes.c_void_p) else a for a in arguments]
            if name in ("cudaStreamCreateWithFlags", "cudaGraphInstantiate"):
                self._next += 1
                arguments[0]._obj.value = shown[0] = self._next
            self.diary.append((name, *shown[:1]))
            return self.failing.get(name, 0)

        return call


@pytest.fixture
def cudart():
    return FakeCudart()


@pytest.fixture
def graphs(cudart):
    made = CudaGraphs(cudart, lambda stream: cudart.diary.append(("stream", stream)), device=None)
    cudart.diary.clear()
    return made


def test_a_step_is_called_then_recorded_then_launched(graphs, cudart):
    calls = []

    def call():
        calls.append(len(calls))
        return f"result {len(calls)}"

    cudart.diary.clear()
    assert graphs.run("key", call) == "result 1"
    assert cudart.diary == []  # nothing of CUDA's in a plain call
    assert graphs.run("key", call) == "result 2"
    names = [name for name, *_ in cudart.diary]
    assert names == [
        "cudaStreamBeginCapture",
        "stream",  # into the recording
        "stream",  # and back
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",  # a recording has not run yet
    ]
    cudart.diary.clear()
    assert graphs.run("key", call) == "result 2"  # the tensor that the recording writes
    assert calls == [0, 1]
    assert cudart.diary == [("cudaGraphLaunch", 9)]


def test_other_shapes_are_other_recordings(graphs, cudart):
    for key in ("a", "b", "a", "b", "b"):
        graphs.run(key, lambda: None)
    launched = [found for name, *found in cudart.diary if name == "cudaGraphLaunch"]
    assert launched == [[9], [10], [10]]


def test_the_least_recently_used_goes_and_can_come_again(graphs, cudart, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        graphs.run(key, lambda: None)
    destroyed = [found for name, *found in cudart.diary if name == "cudaGraphExecDestroy"]
    assert destroyed == [[10]]  # b's
    cudart.diary.clear()
    graphs.run("b", lambda: None)  # plainly, as if it were new
    assert cudart.diary == []


def test_an_error_in_a_recorded_call_ends_the_recording(graphs, cudart):
    def fail():
        raise ValueError("no")

    graphs.run("key", lambda: None)
    with pytest.raises(ValueError, match="no"):
        graphs.run("key", fail)
    assert cudart.diary[-2:] == [("stream", 0), ("cudaStreamEndCapture", 8)]
    assert graphs.run("key", lambda: "fine") == "fine"


def test_cudas_errors_have_cudas_names(graphs, cudart):
    graphs.run("key", lambda: None)
    cudart.failing = {"cudaStreamEndCapture": 901}
    with pytest.raises(LlmcError, match="cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated"):
        graphs.run("key", lambda: None)
    cudart.failing = {"cudaStreamBeginCapture": 999}
    with pytest.raises(LlmcError, match="cudaStreamBeginCapture: 999"):
        graphs.run("key", lambda: None)
