"""Reads numbers, strings, lists and dicts from a checkpoint of another trainer, without unpickling and without torch.

`torch.distributed.checkpoint` saves objects that are not tensors as a pickle in an archive of `torch.save`.
`value_in_archive` reads an archive, `value_of` a pickle. Only the few opcodes of plain values are implemented. The only
global name is `_codecs.encode`, with which protocol 2 writes bytes. Every other opcode, name or value is refused. Lists
and dicts cannot be shared through the memo, so time and memory grow only with the bytes, which are limited.
"""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
from typing import Any, NoReturn

from quadriga import limits
from quadriga.checkpoint.metadata_entries import gc_disabled
from quadriga.checkpoint.plan_format import PlanError, format_raw

MARK = object()
ENCODE = object()  # `_codecs.encode`
HIGHEST_PROTOCOL = 5
SIMPLE: dict[int, Any] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
TEXTS = {0x58: 4, 0x8C: 1}  # bytes of the length field
BYTES = {0x42: 4, 0x43: 1}
GETS = {0x68: 1, 0x6A: 4}
PUTS = {0x71: 1, 0x72: 4}
INTEGERS = {0x4B: (1, False), 0x4D: (2, False), 0x4A: (4, True)}


def value_in_archive(archive: bytes) -> Any:
    """The value in an archive of `torch.save`. Raises PlanError if it is not a plain value."""
    if len(archive) > limits.OBJECT_BYTES:
        raise PlanError(f"longer than the limit for a value ({limits.OBJECT_BYTES:,} bytes)")
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            records = [record for record in opened.infolist() if record.filename.endswith("/data.pkl")]
            if len(records) != 1 or len(opened.infolist()) > limits.SHARD_RECORDS:
                raise PlanError("it is not an archive of one value")
            if records[0].compress_type != zipfile.ZIP_STORED or records[0].file_size > len(archive):
                raise PlanError("its pickle is compressed")
            content = opened.read(records[0])
    except PlanError:
        raise
    except Exception as error:  # zipfile checks few of the numbers in its directory
        raise PlanError(f"it is not an archive of a value ({type(error).__name__})") from error
    return value_of(content)


def value_of(data: bytes) -> Any:
    """The plain value in a pickle of protocol 2 or later: None, booleans, numbers, strings, bytes, and lists, tuples
    and dicts of them. Raises PlanError if it is anything else."""
    if len(data) > limits.OBJECT_BYTES:
        raise PlanError(f"longer than the limit for a value ({limits.OBJECT_BYTES:,} bytes)")
    try:
        with gc_disabled():
            return _Values(data).run()
    except (IndexError, struct.error):
        raise PlanError("ends too early, or reads an empty stack or memo") from None
    except ValueError:
        raise PlanError("has text that is not UTF-8, invalid bytes, or a line without an end") from None


class _Values:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def run(self) -> Any:
        stack = self._stack
        for _ in range(limits.OBJECT_OPCODES):
            start = self._at
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                if len(stack) != 1 or self._at != len(self._data) or stack[0] in (MARK, ENCODE):
                    self._refuse(start, "an end with values or bytes left over")
                self._check_depth(start)
                return stack[0]
            if code in SIMPLE:
                stack.append(SIMPLE[code])
            elif code in INTEGERS:
                size, signed = INTEGERS[code]
                stack.append(int.from_bytes(self._take(size), "little", signed=signed))
            elif code in TEXTS:
                stack.append(str(self._take(self._number(TEXTS[code])), "utf-8"))
            elif code in BYTES:
                stack.append(bytes(self._take(self._number(BYTES[code]))))
            elif code in GETS:
                value = self._memo.get(self._number(GETS[code]))
                if type(value) not in (str, bytes) and value is not ENCODE:
                    self._refuse(start, "a value that is used in two places")
                stack.append(value)
            elif code in PUTS:
                self._memo[self._number(PUTS[code])] = stack[-1]
            elif code == 0x94:  # MEMOIZE
                self._memo[len(self._memo)] = stack[-1]
            elif code == 0x28:
                stack.append(MARK)
            elif code in (0x5D, 0x7D):  # EMPTY_LIST, EMPTY_DICT
                stack.append([] if code == 0x5D else {})
            else:
                self._rarer(code, start)
        raise PlanError(f"has more values than the limit ({limits.OBJECT_OPCODES:,} opcodes)")

    def _rarer(self, code: int, start: int) -> None:
        stack = self._stack
        if code == 0x80:  # PROTO
            if not 2 <= self._take(1)[0] <= HIGHEST_PROTOCOL:
                self._refuse(start, "a protocol that is not supported")
        elif code == 0x95:  # FRAME
            self._take(8)
        elif code == 0x47:  # BINFLOAT
            stack.append(struct.unpack(">d", self._take(8))[0])
        elif code == 0x8A:  # LONG1
            size = self._take(1)[0]
            if size > 8:
                self._refuse(start, "a number of more than 64 bits")
            stack.append(int.from_bytes(self._take(size), "little", signed=True))
        elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
            stack.append(tuple(self._last(code - 0x84, start)))
        elif code == 0x74:  # TUPLE
            stack.append(tuple(self._since_mark(start)))
        elif code in (0x61, 0x65):  # APPEND, APPENDS
            values = self._last(1, start) if code == 0x61 else self._since_mark(start)
            self._top(list, start).extend(values)
        elif code in (0x73, 0x75):  # SETITEM, SETITEMS
            self._set_items(self._last(2, start) if code == 0x73 else self._since_mark(start), start)
        elif code == 0x63:  # GLOBAL
            name = [self._line(), self._line()]
            if name != ["_codecs", "encode"]:
                self._refuse(start, f"{format_raw('.'.join(name))}, which no plain value needs")
            stack.append(ENCODE)
        elif code == 0x52:  # REDUCE
            self._encode(start)
        else:
            self._refuse(start, "an opcode that plain values do not use")

    def _check_depth(self, start: int) -> None:
        """Refuses deep nesting, so that code can process the value recursively."""
        level = self._stack
        for _ in range(limits.METADATA_DEPTH):
            inner = (one.values() if type(one) is dict else one for one in level if type(one) in (list, tuple, dict))
            level = [*itertools.chain.from_iterable(inner)]
            if not level:
                return
        self._refuse(start, f"a value that is nested deeper than {limits.METADATA_DEPTH} levels")

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise IndexError
        return self._data[start : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + limits.PLAN_NAME)
        start, self._at = self._at, end + 1
        return str(self._data[start:end], "utf-8")

    def _last(self, count: int, start: int) -> list[Any]:
        values = self._stack[-count:]
        if len(values) < count:
            raise IndexError
        del self._stack[-count:]
        return self._plain(values, start)

    def _since_mark(self, start: int) -> list[Any]:
        stack = self._stack
        index = next((at for at in range(len(stack) - 1, -1, -1) if stack[at] is MARK), -1)
        if index < 0:
            raise IndexError
        values = stack[index + 1 :]
        del stack[index:]
        return self._plain(values, start)

    def _plain(self, values: list[Any], start: int) -> list[Any]:
        if any(value is MARK or value is ENCODE for value in values):
            self._refuse(start, "something that is not a value")
        return values

    def _top(self, kind: type, start: int) -> Any:
        if type(self._stack[-1]) is not kind:
            self._refuse(start, f"entries for something that is not a {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, values: list[Any], start: int) -> None:
        keys = values[::2]
        if len(values) % 2 or not all(type(key) in (str, int) for key in keys):
            self._refuse(start, "keys that are neither strings nor numbers, or one without a value")
        if any(type(key) is str and len(key) > limits.PLAN_NAME for key in keys):
            self._refuse(start, "a key longer than any name")  # equal keys are compared character by character
        self._top(dict, start).update(zip(keys, values[1::2], strict=True))

    def _encode(self, start: int) -> None:
        """Decodes bytes of protocol 2: a string with one character per byte, encoded as Latin-1."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if function is not ENCODE or type(arguments) is not tuple or len(arguments) != 2:
            self._refuse(start, "a call that no plain value needs")
        text, coding = arguments
        if type(text) is not str or coding != "latin1":
            self._refuse(start, "a call that no plain value needs")
        self._encoded += len(text)
        if self._encoded > len(self._data):
            self._refuse(start, "a text that is encoded repeatedly")
        self._stack.append(text.encode("latin1"))

    def _refuse(self, start: int, what: str) -> NoReturn:
        raise PlanError(f"byte {start} (opcode {self._data[start]:#04x}): {what}")
