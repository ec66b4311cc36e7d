import numpy as np
import pytest

pytest.importorskip("tvm_ffi")

from llmc.runtime import device_inputs, tvm_runtime
from llmc.runtime.device_inputs import HostInputs


def test_inputs_of_known_shapes_are_written_into_their_tensors():
    inputs = HostInputs()
    first = inputs.copy([np.arange(3, dtype=np.int32), np.zeros((1, 2), np.int32)])
    again = inputs.copy([np.array([7, 8, 9], np.int32), np.ones((1, 2), np.int32)])
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in first]
    assert [np.from_dlpack(t).tolist() for t in again] == [[7, 8, 9], [[1, 1]]]
    assert all(t.data_ptr() % tvm_runtime.ALIGNMENT == 0 for t in again)


def test_inputs_of_one_shape_at_different_places_are_different_tensors():
    one, two = HostInputs().copy([np.zeros(2, np.int32), np.ones(2, np.int32)])
    assert np.from_dlpack(one).tolist() == [0, 0]
    assert np.from_dlpack(two).tolist() == [1, 1]


def test_a_slice_that_is_not_contiguous_arrives_as_it_is():
    table = np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:3]
    [tensor] = HostInputs().copy([table])
    np.testing.assert_array_equal(np.from_dlpack(tensor), table)


def test_only_so_many_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(device_inputs, "_MAX_SHAPES", 4)
    inputs = HostInputs()
    for size in range(1, 20):
        [tensor] = inputs.copy([np.full(size, size, np.int32)])
        assert np.from_dlpack(tensor).tolist() == [size] * size
        assert len(inputs._kept) <= 4
