"""The part of TVM that runs artifacts: its runtime libraries through tvm_ffi, without `import tvm`.

The whole Python package with its 250 MB compiler library takes two seconds to import; a server
needs neither.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import ArtifactError

ALIGNMENT = 64  # bytes: what kernels assume of every argument
_LIBRARIES = ("tvm_runtime", "tvm_runtime_extra")  # the Relax VM lives in the second
_SET_THREADS = "llmc_set_threads"  # of a CPU library's thread pool
_AVAILABLE_GLOBAL_MEMORY = 15  # tvm::runtime::kAvailableGlobalMemory
_POOLED_ALLOCATOR = 2  # tvm.relax.VirtualMachine.POOLED_ALLOCATOR


@cache
def tvm_ffi() -> Any:  # noqa: ANN401 - a module without type information
    """The module tvm_ffi, with TVM's runtime libraries loaded.

    tvm_ffi imports torch where it is installed, for the sake of a conflict on Windows: a second
    that the engine does not have. ml_dtypes, for NumPy types that no artifact has, is 2 MiB. Both
    are hidden from it unless they are loaded already.
    """
    optional = ("ml_dtypes",) if sys.platform == "win32" else ("ml_dtypes", "torch")
    hidden = [name for name in optional if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        import tvm_ffi as module
    finally:
        for name in hidden:
            del sys.modules[name]
    for name in _LIBRARIES:
        load_library(name)
    return module


def load_library(name: str) -> None:
    """Loads one of the libraries in TVM's wheel."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    ctypes.CDLL(str(_library_folder() / f"lib{name}{suffix}"), ctypes.RTLD_GLOBAL)


def _library_folder() -> Path:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError("TVM is not installed", hint="pip install llmc")
    return Path(spec.submodule_search_locations[0]) / "lib"


def load_vm(library: Path, device: Any, *, num_threads: int) -> Any:  # noqa: ANN401
    """The Relax VM of a compiled library, ready on `device` (CPU tensors included).

    Loops on the CPU run on `num_threads` threads of the library's own pool, where it has one.
    """
    module = tvm_ffi().load_module(str(library))
    if module.implements_function(_SET_THREADS, query_imports=True):
        module.get_function(_SET_THREADS, query_imports=True)(num_threads)
    vm = module["vm_load_executable"]()
    settings = [device.dlpack_device_type(), device.index, _POOLED_ALLOCATOR]
    cpu = tvm_ffi().device("cpu", 0)
    if settings[0] != cpu.dlpack_device_type():
        settings += [cpu.dlpack_device_type(), 0, _POOLED_ALLOCATOR]
    vm["vm_initialization"](*settings)
    return vm


def empty(shape: tuple[int, ...], dtype: str, device: Any) -> Any:  # noqa: ANN401
    """An uninitialized tensor on `device`; its pages are touched only when they are written."""
    allocate = tvm_ffi().get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(tvm_ffi().Shape(shape), tvm_ffi().dtype(dtype), device, None)


def from_numpy(array: npt.NDArray[Any]) -> Any:  # noqa: ANN401
    """A CPU tensor over the array's memory, or over a copy where that is not aligned."""
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous:
        array = aligned_copy(array)
    return tvm_ffi().from_dlpack(array)


def copy_to(array: npt.NDArray[Any], device: Any) -> Any:  # noqa: ANN401
    """A tensor on `device` with the array's contents."""
    array = np.ascontiguousarray(array)
    tensor = empty(array.shape, str(array.dtype), device)
    copy_into(tensor, array)
    return tensor


def view(memory: Any, shape: tuple[int, ...], *, start: int = 0) -> Any:  # noqa: ANN401
    """A tensor of the same type in another, `start` bytes from its beginning."""
    create = tvm_ffi().get_global_func("runtime.TVMTensorCreateView")
    return create(memory, tvm_ffi().Shape(shape), memory.dtype, start)


class _Tensor(ctypes.Structure):
    """DLManagedTensor of the DLPack specification."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("num_axes", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),  # kind, bits and, of 16 bits, lanes
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("delete", ctypes.c_void_p),
    )


_KINDS = {"i": 0, "f": 2}


class _Described:
    """What `from_dlpack` asks of an array."""

    def __init__(self, description: _Tensor) -> None:
        self._description = description

    def __dlpack__(self, **_: object) -> object:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self._description), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._description.device
        return kind, index


def tensor_at(address: int, shape: tuple[int, ...], dtype: str, device: Any) -> Any:  # noqa: ANN401
    """A tensor over memory of the device at `address`, which has to outlive it.

    Kernels take no tensor that begins inside another (see `view`), but they take this one.
    """
    steps = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    kind = np.dtype(dtype)
    python = ctypes.pythonapi
    python.PyMem_RawMalloc.restype = ctypes.c_void_p
    python.PyMem_RawMalloc.argtypes = [ctypes.c_size_t]
    # One allocation, freed by no code in Python: tensors in cycles live longer than modules do.
    axes = ctypes.c_int64 * (2 * len(shape))
    block = python.PyMem_RawMalloc(ctypes.sizeof(_Tensor) + ctypes.sizeof(axes))
    extents = block + ctypes.sizeof(_Tensor)
    axes.from_address(extents)[:] = [*shape, *steps.tolist()]
    description = _Tensor(
        address,
        (device.dlpack_device_type(), device.index),
        len(shape),
        (_KINDS[kind.kind], 8 * kind.itemsize, 1, 0),
        extents,
        extents + ctypes.sizeof(axes) // 2,
        0,
        None,
        ctypes.cast(python.PyMem_RawFree, ctypes.c_void_p),
    )
    ctypes.memmove(block, ctypes.byref(description), ctypes.sizeof(_Tensor))
    return tvm_ffi().from_dlpack(_Described(_Tensor.from_address(block)))


def copy_into(tensor: Any, array: npt.NDArray[Any]) -> None:  # noqa: ANN401
    """Copies a C-contiguous array into a tensor of its size on any device."""
    copy = tvm_ffi().get_global_func("runtime.TVMTensorCopyFromBytes")
    copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)


def copy_from(tensor: Any) -> npt.NDArray[Any]:  # noqa: ANN401
    """The contents of a tensor on any device; waits for what computes them."""
    array = np.empty(tuple(tensor.shape), np.dtype(str(tensor.dtype)))
    _copy_out(tensor, array)
    return array


def copy_rows_from(tensor: Any, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:  # noqa: ANN401
    """The given ascending rows of a float32 matrix on any device, as `copy_from`."""
    columns = int(tensor.shape[1])
    array = np.empty((len(rows), columns), np.float32)
    if not len(rows):  # as in nearly every step
        return array
    done = 0
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        part = array[done : done + len(run)]
        _copy_out(view(tensor, part.shape, start=int(run[0]) * columns * 4), part)
        done += len(run)
    return array


def _copy_out(tensor: Any, array: npt.NDArray[Any]) -> None:  # noqa: ANN401
    copy = tvm_ffi().get_global_func("runtime.TVMTensorCopyToBytes")
    copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)


def attribute(device: Any, kind: int) -> Any:  # noqa: ANN401
    """What tvm::runtime::DeviceAttrKind `kind` of a device is; None where the device has none."""
    ask = tvm_ffi().get_global_func("runtime.GetDeviceAttr")
    return ask(device.dlpack_device_type(), device.index, kind)


def available_bytes(device: Any) -> int:  # noqa: ANN401
    """Memory that the device's driver can still give, or all of it where it does not say."""
    return int(str(attribute(device, _AVAILABLE_GLOBAL_MEMORY)))


def wait_for(device: Any) -> None:  # noqa: ANN401
    """Waits until the device has done everything that it was given."""
    tvm_ffi().get_global_func("runtime.Device_StreamSync")(device, 0)


def aligned_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that `from_numpy` takes as it is."""
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
