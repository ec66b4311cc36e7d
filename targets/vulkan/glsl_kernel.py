"""Prints a lowered PrimFunc as one GLSL compute shader.

Arguments are slots of 8 bytes, pointers and scalars alike: addresses of buffers (buffer device
address: there are no descriptor sets), then the scalars, then the grid's extent along x. They are
push constants where those have room (PUSH_BYTES, what every device grants), otherwise one push
constant is the address of a buffer that holds them.

A device's grid is limited to 65,535 workgroups along y and z, and some along x too. A kernel that
does not use blockIdx.z lets the runtime fold a longer x into z; its workgroups beyond the extent
end at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm

from llmc.errors import CompileError
from llmc.targets.vulkan.glsl_expressions import (
    Expr,
    ExpressionPrinter,
    reference_name,
)
from llmc.targets.vulkan.glsl_functions import HELPERS
from llmc.targets.vulkan.glsl_integers import WideIntegers
from llmc.targets.vulkan.glsl_matrices import (
    EXTENSIONS,
    FEATURES,
    SIDE,
    is_matrix_scope,
    matrix_type,
    print_matrix_call,
)
from llmc.targets.vulkan.glsl_storage import Storage
from llmc.targets.vulkan.glsl_types import dtype_of, glsl_type, num_bytes, split, stored, with_lanes

PUSH_BYTES = 128
SLOT_BYTES = 8
_AXES = "xyz"
_UNROLLED = 3  # tvm.tirx.ForKind.UNROLLED
_JUMPS = {"break_loop": "break;", "continue_loop": "continue;", "thread_return": "return;"}
_BARRIERS = {
    "shared": "barrier();",
    "shared.dyn": "barrier();",
    "warp": "subgroupMemoryBarrierShared(); subgroupBarrier();",
}
# How scalars are passed: by GLSL's names, in slots that the runtime fills.
_SCALARS = {
    "bool": "int",
    "float16": "float",
    "float32": "float",
    "int8": "int",
    "int16": "int",
    "int32": "int",
    "uint8": "uint",
    "uint16": "uint",
    "uint32": "uint",
}
_EXTENSIONS = (
    "GL_EXT_buffer_reference",
    "GL_EXT_buffer_reference2",
    "GL_EXT_control_flow_attributes",
    "GL_EXT_scalar_block_layout",
    "GL_EXT_shader_16bit_storage",
    "GL_EXT_shader_8bit_storage",
    "GL_EXT_shader_explicit_arithmetic_types",
    "GL_KHR_shader_subgroup_basic",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A shader and what the runtime needs to launch it.

    arguments holds a pointee's bytes ("p4") or a scalar's type ("int32", "float32") for each
    parameter; launch the tags of the extents that follow them.
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...]
    folds_x: bool
    in_buffer: bool  # arguments lie in a buffer, not in push constants
    workgroup: tuple[int, int, int]
    shared_bytes: int
    features: frozenset[str]


def print_kernel(func: tvm.tirx.PrimFunc) -> Kernel:
    """The kernel of a device function; raises CompileError where GLSL cannot express it."""
    name = str(func.attrs["global_symbol"])
    try:
        try:
            return _printed(func, name, wide=False)
        except WideIntegers:
            return _printed(func, name, wide=True)
    except CompileError as exc:
        raise CompileError(f"kernel {name}: {exc.message}", hint=exc.hint) from exc


def _printed(func: tvm.tirx.PrimFunc, name: str, *, wide: bool) -> Kernel:
    """The kernel; which shared arrays are read by vectors is known after printing it once."""
    printer = _KernelPrinter(func, name, wide=wide, vectors=frozenset())
    kernel = printer.kernel()
    vectors = frozenset(printer.expressions.vectors)
    return _KernelPrinter(func, name, wide=wide, vectors=vectors).kernel() if vectors else kernel


class _KernelPrinter:
    """Prints one function; the shared arrays named in `vectors` as arrays of vectors of four."""

    def __init__(
        self, func: tvm.tirx.PrimFunc, name: str, *, wide: bool, vectors: frozenset[str]
    ) -> None:
        self.func = func
        self.name = name
        self.vectors = vectors
        self.expressions = ExpressionPrinter(wide=wide)
        self.head: list[str] = []  # what every thread computes first
        self.lines: list[str] = []
        self.depth = 1
        self.shared: list[str] = []
        self.shared_bytes = 0
        self.extents: dict[str, int] = {}
        self.bound: dict[str, str] = {}  # thread tags and the variables that hold them
        self.pointers: dict[Expr, Storage] = {}
        self.slots: list[str] = []  # declarations
        self.launch = tuple(str(t) for t in func.attrs.get("tirx.kernel_launch_params", ()))
        self.folds_x = "blockIdx.x" in self.launch and "blockIdx.z" not in self.launch

    def kernel(self) -> Kernel:
        """Prints everything."""
        arguments = tuple(self._parameter(p) for p in self.func.params)
        self.slots.append("uint grid_x")
        if self.folds_x:
            self.head += [
                "  uint block_x = gl_WorkGroupID.x + gl_WorkGroupID.z * gl_NumWorkGroups.x;",
                "  if (block_x >= pc.grid_x) return;",
            ]
        self._mark_written()
        self.statement(self.func.body)
        in_buffer = len(self.slots) * SLOT_BYTES > PUSH_BYTES
        x, y, z = (self.extents.get(f"threadIdx.{axis}", 1) for axis in _AXES)
        return Kernel(
            name=self.name,
            source=self._source(in_buffer, (x, y, z)),
            arguments=arguments,
            launch=self.launch,
            folds_x=self.folds_x,
            in_buffer=in_buffer,
            workgroup=(x, y, z),
            shared_bytes=self.shared_bytes,
            features=frozenset(self.expressions.features),
        )

    def _parameter(self, param: Expr) -> str:
        printer = self.expressions
        name = printer.name_of(param)
        if type(param.ty).__name__ == "PointerType":
            dtype = str(param.ty.element_type.dtype)
            self.pointers[param] = Storage(name=name, dtype=dtype, is_global=True)
            self.slots.append(f"{printer.reference(dtype, num_bytes(dtype), written=False)} {name}")
            return f"p{num_bytes(dtype)}"
        dtype = dtype_of(param)
        if dtype == "int64":
            kind = "int64_t" if printer.wide else "int"
            self.slots.append(f"{kind} {name}")
        elif dtype in _SCALARS:
            self.slots.append(f"{_SCALARS[dtype]} {name}")
        else:
            raise CompileError(f"argument {param.name} of type {dtype}")
        value = printer.type_of(dtype)
        self.head.append(f"  {value} {name} = {value}(pc.{name});")
        return "index" if dtype == "int64" and not printer.wide else dtype

    def _mark_written(self) -> None:
        """Finds the parameters that are stored to: the others' pointers are read-only."""
        views: dict[Expr, Expr] = {}
        body = self.func.body

        def visit(node: Expr) -> None:
            if type(node).__name__ == "DeclBuffer":
                data = node.data
                views[node.buffer] = data.args[0] if type(data).__name__ == "Call" else data
            elif type(node).__name__ == "BufferStore":
                source = node.buffer
                while source in views:
                    source = views[source]
                if source in self.pointers:
                    self.pointers[source].is_written = True

        _walk(body, visit)

    def statement(self, stmt: tvm.tirx.Stmt) -> None:
        """Prints a statement."""
        kind = type(stmt).__name__
        handler = _STATEMENTS.get(kind)
        if handler is None:
            raise CompileError(f"GLSL cannot express {kind}: {str(stmt)[:200]}")
        handler(self, stmt)

    def _emit(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def _block(self, head: str, body: tvm.tirx.Stmt) -> None:
        self._emit(f"{head} {{")
        self.depth += 1
        self.statement(body)
        self.depth -= 1
        self._emit("}")

    def sequence(self, stmt: tvm.tirx.Stmt) -> None:
        """Statements one after the other."""
        for inner in stmt.seq:
            self.statement(inner)

    def declare(self, stmt: tvm.tirx.Stmt) -> None:
        """A view of memory that a parameter or an allocation holds."""
        data = stmt.data
        source = data.args[0] if type(data).__name__ == "Call" else data
        known = self.pointers.get(source) or self.expressions.storages.get(source)
        if known is None:
            raise CompileError(f"{stmt.buffer.name} is a view of something unknown: {data}")
        dtype = str(stmt.buffer.dtype)
        if not known.is_global and stored(dtype) != stored(known.dtype):
            raise CompileError(
                f"{stmt.buffer.name} ({dtype}) shares memory with a buffer of {known.dtype}",
                hint='allocate with scope "shared", not "shared.dyn"',
            )
        self.expressions.storages[stmt.buffer] = known

    def allocate(self, stmt: tvm.tirx.Stmt) -> None:
        """An array in shared memory or of the thread."""
        printer, buffer = self.expressions, stmt.buffer
        scope = str(buffer.scope())
        dtype = str(buffer.dtype)
        count = 1
        for extent in buffer.shape:
            if not isinstance(extent, tvm.tirx.IntImm):
                raise CompileError(f"{buffer.name} has an extent that is not constant: {extent}")
            count *= int(extent)
        name = printer.name_of(buffer)
        if is_matrix_scope(scope):
            self._allocate_matrices(buffer, name, scope, count)
            return
        shared = scope.startswith("shared")
        if not shared and scope not in ("local", "warp"):
            raise CompileError(f"{buffer.name} lies in {scope!r}, which Vulkan does not have")
        if split(dtype)[0] in ("int64", "uint64") and not printer.wide:
            raise WideIntegers
        kind = printer.type_of(stored(dtype) if shared else dtype)
        if shared:
            if name in self.vectors:
                kind, count = printer.type_of(with_lanes(dtype, 4)), -(-count // 4)
                self.shared_bytes += count * 4 * num_bytes(dtype)
            else:
                self.shared_bytes += count * num_bytes(dtype)
            self.shared.append(f"shared {kind} {name}[{count}];")
        else:
            self._emit(f"{kind} {name}[{count}];")
        printer.storages[buffer] = Storage(
            name=name,
            dtype=dtype,
            is_global=False,
            is_shared=shared,
            is_vectors=name in self.vectors,
        )

    def _allocate_matrices(self, buffer: Expr, name: str, scope: str, count: int) -> None:
        """Matrices of the subgroup, as registers hold them."""
        printer, dtype = self.expressions, str(buffer.dtype)
        if count % SIDE**2:
            raise CompileError(f"{buffer.name} has {count} elements, no whole matrices")
        self._emit(f"{matrix_type(scope, dtype)} {name}[{count // SIDE**2}];")
        printer.extensions.update(EXTENSIONS)
        printer.features.update(FEATURES)
        printer.storages[buffer] = Storage(name=name, dtype=dtype, is_global=False)

    def attribute(self, stmt: tvm.tirx.Stmt) -> None:
        """A thread's or workgroup's number; other attributes are hints for passes gone by."""
        if str(stmt.attr_key) == "thread_extent":
            tag, var = str(stmt.node.thread_tag), stmt.node.var
            axis = tag[-1]
            if tag.startswith("threadIdx"):
                if not isinstance(stmt.value, tvm.tirx.IntImm):
                    raise CompileError(f"{tag} has an extent that is not constant: {stmt.value}")
                self.extents[tag] = int(stmt.value)
                value = f"gl_LocalInvocationID.{axis}"
            elif tag.startswith("blockIdx"):
                value = "block_x" if axis == "x" and self.folds_x else f"gl_WorkGroupID.{axis}"
            else:
                raise CompileError(f"thread axis {tag}, which Vulkan does not have")
            if tag not in self.bound:
                kind = self.expressions.type_of(dtype_of(var))
                self.bound[tag] = self.expressions.name_of(var)
                # At the top: a tag may be bound again in a block beside the first one.
                self.head.append(f"  {kind} {self.bound[tag]} = {kind}({value});")
            self.expressions.names[var] = self.bound[tag]
            if isinstance(stmt.value, tvm.tirx.IntImm):
                self.expressions.learn(var, tvm.ir.Range(0, stmt.value))
        self.statement(stmt.body)

    def loop(self, stmt: tvm.tirx.Stmt) -> None:
        """A for loop."""
        printer, var = self.expressions, stmt.loop_var
        name, kind = printer.name_of(var), printer.type_of(dtype_of(var))
        begin, extent = printer.print(stmt.min), printer.print(stmt.extent)
        if isinstance(stmt.min, tvm.tirx.IntImm) and isinstance(stmt.extent, tvm.tirx.IntImm):
            if int(stmt.extent) > 0:
                printer.learn(var, tvm.ir.Range.from_min_extent(stmt.min, stmt.extent))
            end = str(int(stmt.min) + int(stmt.extent))
        else:
            end = extent if begin == "0" else f"{begin} + {extent}"
        step = "++" + name
        if stmt.step is not None and printer.print(stmt.step) != "1":
            step = f"{name} += {printer.print(stmt.step)}"
        if int(stmt.kind) == _UNROLLED:
            self._emit("[[unroll]]")
        self._block(f"for ({kind} {name} = {begin}; {name} < {end}; {step})", stmt.body)

    def branch(self, stmt: tvm.tirx.Stmt) -> None:
        """If and else."""
        self._block(f"if ({self.expressions.print(stmt.condition)})", stmt.then_case)
        if stmt.else_case is not None:
            self._block("else", stmt.else_case)

    def bind(self, stmt: tvm.tirx.Stmt) -> None:
        """A variable that is set once."""
        printer = self.expressions
        dtype = dtype_of(stmt.var)
        kind = printer.type_of(dtype)
        if dtype in ("int32", "int64"):
            # So that what is known of the value is known of the variable, alignment above all.
            printer.learn(stmt.var, stmt.value)
        self._emit(f"{kind} {printer.name_of(stmt.var)} = {printer.print(stmt.value)};")

    def store(self, stmt: tvm.tirx.Stmt) -> None:
        """A store of one element or of a vector of them."""
        printer = self.expressions
        storage = printer.storage_of(stmt.buffer)
        [index] = stmt.indices
        dtype, value = str(stmt.buffer.dtype), printer.print(stmt.value)
        if type(index).__name__ != "Ramp":
            target = printer.element(storage, dtype, printer.index(index))
            self._emit(f"{target} = {self._as_stored(value, dtype_of(stmt.value), storage)};")
            return
        access = printer.vector_access(storage, index, dtype)
        if access is not None:
            self._emit(f"{access} = {self._as_stored(value, dtype_of(stmt.value), storage)};")
            return
        lanes = f"lanes_{len(self.lines)}"
        self._emit(f"{printer.type_of(dtype_of(stmt.value))} {lanes} = {value};")
        for lane, target in enumerate(printer.elements(storage, index, dtype)):
            self._emit(f"{target} = {self._as_stored(f'{lanes}[{lane}]', dtype, storage)};")

    def _as_stored(self, value: str, dtype: str, storage: Storage) -> str:
        if storage.is_global or stored(dtype) != dtype:
            return f"{self.expressions.stored_type(stored(dtype))}({value})"
        return value

    def evaluate(self, stmt: tvm.tirx.Stmt) -> None:
        """A call for its effect."""
        value = stmt.value
        if type(value).__name__ != "Call":
            return
        name = str(value.op.name).rpartition(".")[2]
        if name in _JUMPS:
            self._emit(_JUMPS[name])
        elif name == "tvm_storage_sync":
            scope = str(value.args[0].value)
            if scope not in _BARRIERS:
                raise CompileError(f"a barrier of scope {scope!r}, which Vulkan does not have")
            self._emit(_BARRIERS[scope])
        else:
            printed = print_matrix_call(self.expressions, name, list(value.args))
            self._emit(printed or f"{self.expressions.print(value)};")

    def _source(self, in_buffer: bool, workgroup: tuple[int, int, int]) -> str:
        printer = self.expressions
        extensions = sorted({*_EXTENSIONS, *printer.extensions})
        lines = ["#version 460", *(f"#extension {e} : require" for e in extensions)]
        x, y, z = workgroup
        lines.append(f"layout(local_size_x = {x}, local_size_y = {y}, local_size_z = {z}) in;")
        for dtype, alignment, written in sorted(printer.references):
            name = reference_name(dtype, alignment, written=written)
            access = "" if written else "readonly "
            lines.append(
                f"layout(buffer_reference, scalar, buffer_reference_align = {alignment}) "
                f"{access}buffer {name} {{ {glsl_type(dtype)} v[]; }};"
            )
        members = " ".join(
            f"layout(offset = {SLOT_BYTES * at}) {declaration};"
            for at, declaration in enumerate(self.slots)
        )
        if in_buffer:
            lines += [
                "layout(buffer_reference, scalar, buffer_reference_align = 8) "
                f"readonly buffer Arguments {{ {members} }};",
                "layout(push_constant, scalar) uniform Push { Arguments pc; };",
            ]
        else:
            lines.append(f"layout(push_constant, scalar) uniform Push {{ {members} }} pc;")
        for helper, integer in sorted(printer.helpers):
            text = HELPERS[helper].strip()
            lines.append(text.replace("int ", f"{integer} ") if integer else text)
        return "\n".join([*lines, *self.shared, "void main() {", *self.head, *self.lines, "}", ""])


def _walk(stmt: tvm.tirx.Stmt, visit: Callable[[Expr], None]) -> None:
    """Calls `visit` for every statement, outer ones first."""
    visit(stmt)
    for name in ("seq", "body", "then_case", "else_case"):
        inner = getattr(stmt, name, None)
        if inner is None:
            continue
        for child in inner if name == "seq" else [inner]:
            _walk(child, visit)


_STATEMENTS: dict[str, Callable[[_KernelPrinter, tvm.tirx.Stmt], None]] = {
    "AllocBuffer": _KernelPrinter.allocate,
    "AssertStmt": lambda p, s: None,  # a kernel has no way to report it
    "AttrStmt": _KernelPrinter.attribute,
    "Bind": _KernelPrinter.bind,
    "Break": lambda p, s: p._emit("break;"),
    "BufferStore": _KernelPrinter.store,
    "Continue": lambda p, s: p._emit("continue;"),
    "DeclBuffer": _KernelPrinter.declare,
    "Evaluate": _KernelPrinter.evaluate,
    "For": _KernelPrinter.loop,
    "IfThenElse": _KernelPrinter.branch,
    "Return": lambda p, s: p._emit("return;"),
    "SeqStmt": _KernelPrinter.sequence,
    "While": lambda p, s: p._block(f"while ({p.expressions.print(s.condition)})", s.body),
}
