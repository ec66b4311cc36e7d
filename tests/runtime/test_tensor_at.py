"""Tensors over memory that others own."""

import subprocess
import sys

import numpy as np

from llmc.runtime import tvm_runtime

CYCLE = """
import numpy as np
from llmc.runtime import tvm_runtime

class Owner:
    pass

owner = Owner()
owner.itself, owner.memory = owner, np.zeros(16, np.float32)
device = tvm_runtime.tvm_ffi().device("cpu", 0)
owner.tensor = tvm_runtime.tensor_at(owner.memory.ctypes.data, (16,), "float32", device)
"""


def test_a_tensor_at_an_address_has_its_memory_and_shape():
    memory = np.arange(64, dtype=np.int32)
    device = tvm_runtime.tvm_ffi().device("cpu", 0)
    tensor = tvm_runtime.tensor_at(memory.ctypes.data + 64, (3, 4, 2), "int32", device)
    memory[20] = 7
    assert tuple(tensor.shape) == (3, 4, 2)
    np.testing.assert_array_equal(np.from_dlpack(tensor), memory[16:40].reshape(3, 4, 2))


def test_a_program_whose_tensors_live_until_its_end_ends_well():
    """As an engine's do that a module has: in cycles, which go when modules are gone."""
    done = subprocess.run([sys.executable, "-c", CYCLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
