"""Random pickle programs, most of them hostile, and a watch that sees when one is executed. For tests."""

from __future__ import annotations

import io
import pickle
import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

# Of Python's audit events, what a reader of bytes must not cause.
FORBIDDEN = ("import", "exec", "compile", "open", "pickle.find_class", "subprocess.", "os.", "ctypes.", "socket.")
SEEN: list[str] = []
WATCHING = [False]


class Canary:
    """An object that tells when anything is done with it."""

    shared: ClassVar[int] = 0

    def __new__(cls, *args: Any) -> Canary:
        SEEN.append("Canary")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        SEEN.append("Canary")

    def __hash__(self) -> int:
        SEEN.append("Canary")
        return 0

    def __del__(self) -> None:
        SEEN.append("Canary")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if WATCHING[0] and event.startswith(FORBIDDEN):
        SEEN.append(event)


class ExecutionWatch:
    """`seen`: what was executed while `reading`. An audit hook cannot be removed, so it is one that sleeps."""

    installed: ClassVar[bool] = False

    def __enter__(self) -> ExecutionWatch:
        if not ExecutionWatch.installed:
            sys.addaudithook(_hook)
            ExecutionWatch.installed = True
        self.seen = SEEN
        SEEN.clear()
        return self

    def __exit__(self, *_: object) -> None:
        SEEN.clear()

    @contextmanager
    def reading(self) -> Iterator[None]:
        WATCHING[0] = True
        try:
            yield
        finally:
            WATCHING[0] = False

    def unpickle(self, data: bytes) -> None:
        """As pickle does it, but for names of other modules than this one, and programs that could exhaust memory."""
        with suppress(Exception):
            _RestrictedUnpickler(io.BytesIO(data)).load()


class _RestrictedUnpickler(pickle._Unpickler):  # the one in Python: its memo is a dict, so a huge index is no bomb
    def find_class(self, module: str, name: str) -> Any:
        SEEN.append("pickle.find_class")
        if (module, name) == ("opcode_fuzz", "Canary"):
            return Canary
        raise pickle.UnpicklingError("not in a test")


METADATA = "torch.distributed.checkpoint.metadata"
NAMES = [
    *(("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("subprocess", "Popen")),
    *(("opcode_fuzz", "Canary"), ("opcode_fuzz", "Canary.shared"), ("builtins", "__import__"), ("torch", "load")),
    *(("torch", "Size"), ("torch", "float32"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")),
    *((METADATA, "Metadata"), (METADATA, "MetadataIndex"), (METADATA, "BytesStorageMetadata"), ("torch", "device")),
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.distributed.device_mesh", "DeviceMesh")),
    *(("copyreg", "_reconstructor"), ("functools", "partial"), ("operator", "attrgetter"), ("types", "FunctionType")),
]
TEXTS = ["touch harmed", "__setstate__", "__class__", "__reduce__", "__dict__", "fqn", "offset", "sizes", "", "a" * 300]
SIMPLE = [
    *(b"R", b"b", b"\x81", b"\x92", b"o", b"Q", b"0", b"1", b"2", b"(", b")", b"]", b"}", b"N", b"\x88", b"\x89"),
    *(b"t", b"\x85", b"\x86", b"\x87", b"e", b"a", b"s", b"u", b"\x90", b"\x8f", b"\x91", b"\x94", b"\x97", b"\x98"),
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Pid\n", b"I9\n", b"L99999999L\n", b"F1.5\n"),
    *(b"K\x07", b"M\xff\xff", b"J\xff\xff\xff\xff", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"S'a'\n", b"Va\n"),
    *(b"\x8a\x08" + bytes(7) + b"\x40", b"\x8b\xff\xff\xff\x7f", b"\x8b\x02\x00\x00\x00\x01\x01", b"\x8a\xff"),
    *(b"h\x00", b"h\x01", b"h\x02", b"h\x05", b"j\x03\x00\x00\x00", b"j\xff\xff\xff\xff", b"q\x00"),
    *(b"r\xff\xff\xff\x7f", b"p7\n", b"g0\n", b"B\xff\xff\xff\xff", b"C\x03abc", b"X\xff\xff\xff\xff", b"U\x01a"),
    *(b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"\x96" + b"\xff" * 8),
]


def _text(value: str) -> bytes:
    content = value.encode()
    head = b"\x8c" + bytes([len(content)]) if len(content) < 256 else b"X" + struct.pack("<I", len(content))
    return head + content


def _opcode(dice: random.Random) -> bytes:
    module, name = dice.choice(NAMES)
    fetched, text = _text(module) + _text(name) + b"\x93", _text(dice.choice(TEXTS))
    by_name = [
        fetched,
        f"c{module}\n{name}\n".encode(),  # GLOBAL
        f"(i{module}\n{name}\n".encode(),  # INST
        b"(" + fetched + text + b"o",  # OBJ
        fetched + text + b"\x85R",  # a call
        fetched + b")\x81",  # NEWOBJ
        fetched + b")}\x92",  # NEWOBJ_EX
        fetched + b"N}" + text + b"Ns\x86b",  # BUILD on what it is
    ]
    return dice.choice(by_name) if dice.random() < 0.3 else dice.choice([*SIMPLE, text])


def case(dice: random.Random, sound: list[bytes]) -> bytes:
    """A sound program with hostile pieces in it, or with bytes changed; or one of nothing else."""
    way = dice.randrange(4)
    if way == 0:
        head = b"\x80" + bytes([dice.choice((2, 4, 4, 4, 5))])
        return head + b"".join(_opcode(dice) for _ in range(dice.randint(1, 40))) + b"."
    program = bytearray(dice.choice(sound))
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(len(program) + 1)
        if way == 1:
            program[at:at] = b"".join(_opcode(dice) for _ in range(dice.randint(1, 4)))
        elif way == 2:
            others = bytes(dice.randrange(256) for _ in range(dice.choice((0, 1, 1, 2))))
            program[at : at + dice.choice((1, 1, 2, 9))] = others
        else:
            start = dice.randrange(len(program))
            program[at:at] = program[start : start + dice.randint(1, 60)]
    return bytes(program)
