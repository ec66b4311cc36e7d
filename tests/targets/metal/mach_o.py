"""Reads what matters of a Mach-O library: <mach-o/loader.h>, 64 bits, little-endian."""

import struct
from dataclasses import dataclass, field

MAGIC, ARM64, DYLIB = 0xFEEDFACF, 0x0100000C, 6
_SYMTAB, _LOAD_DYLIB, _ID_DYLIB, _SIGNATURE, _BUILD_VERSION = 2, 0xC, 0xD, 0x1D, 0x32
_DYLD_INFO = 0x80000022
_EXTERNAL, _TYPE, _UNDEFINED, _STAB = 0x01, 0x0E, 0x0, 0xE0


@dataclass
class Library:
    processor: int = 0
    kind: int = 0
    name: str = ""
    platform: int = 0  # 1 is macOS
    oldest: tuple[int, int] = (0, 0)
    signed: bool = False
    needs: list[str] = field(default_factory=list)
    defined: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)  # what the system looks up when it loads it


def read(data: bytes) -> Library:
    magic, processor, _, kind, count = struct.unpack_from("<5I", data)
    assert magic == MAGIC
    library = Library(processor=processor, kind=kind)
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _SYMTAB:
            _symbols(library, data, *struct.unpack_from("<4I", data, at + 8))
        elif command in (_LOAD_DYLIB, _ID_DYLIB):
            (offset,) = struct.unpack_from("<I", data, at + 8)
            name = _text(data, at + offset)
            if command == _ID_DYLIB:
                library.name = name
            else:
                library.needs.append(name)
        elif command == _BUILD_VERSION:
            library.platform, oldest = struct.unpack_from("<2I", data, at + 8)
            library.oldest = (oldest >> 16, oldest >> 8 & 0xFF)
        elif command == _DYLD_INFO:
            # Rebasing, then three tables of bindings: at once, weak and lazy.
            places = struct.unpack_from("<8I", data, at + 8)
            for begin, length in zip(places[2::2], places[3::2], strict=True):
                library.bound |= _bound(data, begin, length)
        elif command == _SIGNATURE:
            library.signed = True
        at += size
    return library


def _symbols(library, data, offset, count, strings, _):
    for entry in range(offset, offset + 16 * count, 16):
        name, kind = struct.unpack_from("<IB", data, entry)
        if kind & _STAB or not kind & _EXTERNAL:
            continue
        if kind & _TYPE != _UNDEFINED:
            library.defined.add(_text(data, strings + name))


def _bound(data, begin, size):
    """The names in a table of binding opcodes; of all others only the operands' length counts."""
    at, end, names = begin, begin + size, set()
    while at < end:
        opcode = data[at] & 0xF0
        at += 1
        if opcode == 0x40:  # BIND_OPCODE_SET_SYMBOL_TRAILING_FLAGS_IMM
            names.add(_text(data, at))
            at += len(_text(data, at)) + 1
        # Those with one number of seven bits a byte, and the one with two.
        for _ in range({0x20: 1, 0x60: 1, 0x70: 1, 0x80: 1, 0xA0: 1, 0xC0: 2}.get(opcode, 0)):
            while data[at] & 0x80:
                at += 1
            at += 1
    return names


def _text(data, at):
    return data[at : data.index(b"\0", at)].decode()
