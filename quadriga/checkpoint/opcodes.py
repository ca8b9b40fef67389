"""Interpreter of the subset of pickle in which plans of torch.distributed.checkpoint are written.

A pickle is a program. `Interpreter` runs it without calls and imports: names of classes become `GlobalName`, objects
become plain records, and the few functions that a plan calls (for example `torch.Size`) are implemented here. Every
other opcode, name or value raises PlanError.

Only protocol 4 and later are read (DCP uses it since Python 3.8). Time and memory grow only with the bytes of the file:
`quadriga.limits` limits nesting and the number of values, lists and dicts cannot be shared or nested through the memo,
and only strings and values of checked types are hashed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NoReturn

from quadriga import limits
from quadriga.checkpoint.dcp_objects import (
    A_FORMAT,
    A_PATH,
    FIELDS,
    LAYOUT,
    MEMORY,
    NAMES,
    PATH,
    SIZE,
    SMALL,
    STRIDED,
    DcpRecord,
    GlobalName,
    Pairs,
    is_size,
    properties,
)
from quadriga.checkpoint.plan_format import PlanError, format_raw

STEP = 1 << 16  # bytes interpreted between two checks of the limits
HIGHEST_PROTOCOL = 5
UNSHARED = None  # memo entry of values that no writer fetches again: lists, dicts, and incomplete records


# Three of four bytes of a large plan are small objects with a state of two or three entries, whose class and keys come
# from the memo. A regular expression matches each of them as a whole, which is three times as fast.
_GET = rb"(?:h.|j.{4})"
_NUMBER = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"
_SIZE = rb"(?:" + _GET + rb"(?:" + _NUMBER + rb"{1,3}[\x85\x86\x87]\x94|\))\x85\x94R\x94)"
_ENTRY = rb"(" + _GET + rb")(" + _SIZE + rb"|" + _GET + rb"|" + _NUMBER + rb")"
RECORD = re.compile(rb"(" + _GET + rb")\)\x81\x94\}\x94\(" + _ENTRY * 2 + rb"(?:" + _ENTRY + rb")?ub", re.DOTALL)
SIZES = re.compile(rb"(" + _GET + rb")(?:(" + _NUMBER + rb"{1,3})([\x85\x86\x87])\x94|\))\x85\x94R\x94", re.DOTALL)
NUMBER = re.compile(_NUMBER, re.DOTALL)
KNOWN = 1 << 16  # decoded values that are cached
Decoded = tuple[type, Any, tuple[Any, ...]]  # the type of a value, the value, the entries added to the memo
Layout = tuple[str, tuple[type, ...], Callable[[tuple[Any, ...]], tuple[Any, ...]]]
NOT_DECODED: Decoded = (type(None), None, ())
CONSTANTS: dict[int, Any] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
PLAIN = {int, str, bool, type(None), GlobalName}


def _number(code: bytes) -> int:
    """The argument of an opcode of `_GET` or `_NUMBER`."""
    start = 2 if code[0] == 0x8A else 1
    return int.from_bytes(code[start:], "little", signed=code[0] in b"J\x8a")


class Interpreter:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._made = 0  # records, lists and dicts
        self._known: dict[bytes, Decoded] = {}  # cache of `_decode`; valid because memo entries never change
        self._layouts: dict[tuple[bytes, ...], Layout] = {}

    def run(self) -> Any:
        """The value of the pickle. Raises PlanError with the byte and the opcode if it is not the pickle of a plan."""
        try:
            return self._run()
        except IndexError:
            raise PlanError("ends too early, or reads an empty stack or memo") from None
        except UnicodeDecodeError:
            raise PlanError("has text that is not UTF-8") from None

    def _run(self) -> Any:
        """Interprets the frequent opcodes of a large plan inline, the others with one method each."""
        data, stack, memo, marks = self._data, self._stack, self._memo, self._marks
        push, at = stack.append, 0
        end = len(data)
        while at < end:
            self._check_limits()
            stop = min(at + STEP, end)
            while at < stop:
                code = data[at]
                if code == 0x94:  # MEMOIZE
                    top = stack[-1]
                    memo.append(UNSHARED if type(top) in (list, Pairs) else top)
                    at += 1
                elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                    number = data[at + 1] if code == 0x68 else int.from_bytes(data[at + 1 : at + 5], "little")
                    value = memo[number]
                    if value is UNSHARED:
                        self._refuse(at, "a list or a dict that is used in two places")
                    behind = self._record(at) if type(value) is GlobalName and value.kind == "record" else 0
                    if behind:
                        at = behind
                        continue
                    push(value)
                    at += 2 if code == 0x68 else 5
                elif code == 0x4B:  # BININT1
                    push(data[at + 1])
                    at += 2
                elif code == 0x4D:  # BININT2
                    push(data[at + 1] | data[at + 2] << 8)
                    at += 3
                elif code == 0x4A:  # BININT
                    push(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
                    at += 5
                elif code == 0x28:  # MARK
                    marks.append(len(stack))
                    at += 1
                elif code == 0x75:  # SETITEMS
                    start = marks.pop()
                    if len(stack) - start & 1:
                        self._refuse(at, "a key without a value")
                    self._pairs(start - 1, at).extend(stack[start:])
                    del stack[start:]
                    at += 1
                elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                    at = self._short_tuple(code - 0x84, at)
                elif code == 0x8C:  # SHORT_BINUNICODE
                    start, at = at + 2, at + 2 + data[at + 1]
                    push(str(data[start:at], "utf-8"))
                elif code in CONSTANTS:
                    push(CONSTANTS[code])
                    at += 1
                elif code in OTHER_OPCODES:
                    at = OTHER_OPCODES[code](self, at)
                elif code == 0x2E:  # STOP
                    return self._result(at)
                else:
                    self._refuse(at, "an opcode that plans do not use")
        raise IndexError

    def _record(self, at: int) -> int:
        """Interprets all opcodes of one small object. Returns their end, or 0 if it is not an object of `SMALL`."""
        found = RECORD.match(self._data, at)
        if found is None:
            return 0
        name, key, first, other_key, second, last_key, third = found.groups()
        codes = (name, key, other_key, last_key)
        kind, kinds, order = self._layouts.get(codes) or self._layout(codes)
        known, memo = self._known, self._memo
        record, before = DcpRecord(kind), len(memo)
        a = known.get(first) or self._decode(first)
        memo += (record, UNSHARED, *a[2])  # before the values: they can fetch it
        b = known.get(second) or self._decode(second)
        memo += b[2]
        types: tuple[type, ...] = (a[0], b[0])
        values: tuple[Any, ...] = (a[1], b[1])
        if third is not None:
            c = known.get(third) or self._decode(third)
            memo += c[2]
            types, values = (*types, c[0]), (*values, c[1])
        if types != kinds:
            del memo[before:]
            return 0
        record.fields = order(values)
        self._made += 2
        self._stack.append(record)
        return found.end()

    def _layout(self, codes: tuple[bytes, ...]) -> Layout:
        """For a class and its keys: the required types of the values, and a function that puts them in order."""
        kind = self._memo[_number(codes[0])].value
        keys = [self._memo[_number(code)] for code in codes[1:] if code is not None]
        wanted = SMALL.get(kind, {})
        if any(type(key) is not str for key in keys) or sorted(keys) != sorted(wanted):
            return kind, (), tuple
        order = itemgetter(*(keys.index(key) for key in wanted if (kind, key) != ("MetadataIndex", "index")))
        layout = self._layouts[codes] = kind, tuple(wanted[key] for key in keys), order
        return layout

    def _decode(self, code: bytes) -> Decoded:
        """The value of opcodes that fetch from the memo or make a number or a Size, and the entries they memoize."""
        entries: tuple[Any, ...] = ()
        if sizes := SIZES.fullmatch(code):
            value: Any = tuple(map(_number, NUMBER.findall(sizes[2] or b"")))
            if self._memo[_number(sizes[1])] is not SIZE or (sizes[3] and ord(sizes[3]) - 0x84 != len(value)):
                return NOT_DECODED
            entries = (UNSHARED, UNSHARED, value) if sizes[3] else (UNSHARED, value)
        else:
            value = self._memo[_number(code)] if code[0] in b"hj" else _number(code)
        if not (type(value) in (int, str) or is_size(value)):
            return NOT_DECODED
        if len(self._known) >= KNOWN:
            self._known.clear()
        meaning = self._known[code] = type(value), value, entries
        return meaning

    def _check_limits(self) -> None:
        if len(self._marks) > limits.METADATA_DEPTH or len(self._stack) > limits.METADATA_STACK:
            raise PlanError("is nested deeper than a plan")
        if len(self._memo) > limits.METADATA_VALUES or self._made > limits.METADATA_VALUES:
            raise PlanError(f"more values than the limit for a plan ({limits.METADATA_VALUES:,})")

    def _result(self, at: int) -> Any:
        if len(self._stack) != 1 or self._marks or at + 1 != len(self._data):
            self._refuse(at, "an end with values or bytes left over")
        return self._stack[0]

    def _protocol(self, at: int) -> int:
        if not 4 <= self._data[at + 1] <= HIGHEST_PROTOCOL:
            self._refuse(at, f"protocol {self._data[at + 1]}; DCP writes 4 or later")
        return at + 2

    def _frame(self, at: int) -> int:
        return at + 9  # the length of a frame is ignored

    def _text(self, at: int) -> int:
        start = at + 5
        end = start + int.from_bytes(self._data[at + 1 : start], "little")
        if end - start > limits.PLAN_NAME:
            self._refuse(at, "a text longer than any name")
        self._stack.append(str(self._data[start:end], "utf-8"))
        return end

    def _integer(self, at: int) -> int:
        length = self._data[at + 1]
        if length > 8:
            self._refuse(at, "a number of more than 64 bits")
        end = at + 2 + length
        self._stack.append(int.from_bytes(self._data[at + 2 : end], "little", signed=True))
        return end

    def _empty_list(self, at: int) -> int:
        self._made += 1
        self._stack.append([])
        return at + 1

    def _empty_dict(self, at: int) -> int:
        self._made += 1
        self._stack.append(Pairs())
        return at + 1

    def _name(self, at: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if not (type(name) is type(module) is str):
            self._refuse(at, "a name that is not a string")
        mark = NAMES.get((module, name))
        if mark is None:
            self._refuse(at, f"{format_raw(f'{module}.{name}')}, which is not part of a checkpoint's plan")
        self._stack.append(mark)
        return at + 1

    def _new_object(self, at: int) -> int:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if arguments != () or type(arguments) is not tuple or type(cls) is not GlobalName or cls.kind != "record":
            self._refuse(at, "an object that no plan has")
        self._made += 1
        self._stack.append(DcpRecord(cls.value))
        return at + 1

    def _call(self, at: int) -> int:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not GlobalName or type(arguments) is not tuple:
            self._refuse(at, "a call of something that is not a function")
        if function is SIZE and len(arguments) == 1 and is_size(arguments[0]):
            self._stack.append(arguments[0])
        elif function is LAYOUT and arguments == ("torch.strided",):
            self._stack.append(STRIDED)
        elif function is MEMORY and len(arguments) == 1 and type(arguments[0]) is int and 0 <= arguments[0] <= 2:
            self._stack.append(A_FORMAT)
        elif function is PATH and all(type(part) is str for part in arguments):
            self._stack.append(A_PATH)
        else:
            self._refuse(at, f"a call of {format_raw(function.kind)} with arguments that no plan has")
        return at + 1

    def _build(self, at: int) -> int:
        state, record = self._stack.pop(), self._stack[-1]
        if type(record) is not DcpRecord or record.fields is not None:
            self._refuse(at, "a state for something that is not an object of a plan, or has a state")
        fields: tuple[Any, ...] | None = None
        if type(state) is Pairs:
            keys = state[::2]
            if all(type(key) is str for key in keys) and len({*keys}) == len(keys):
                fields = FIELDS[record.kind](dict(zip(keys, state[1::2], strict=True)))
        elif type(state) is tuple and record.kind == "TensorProperties":
            fields = properties(state)
        if fields is None:
            self._refuse(at, f"a state that no {record.kind} has")
        record.fields = fields
        return at + 1

    def _pairs(self, index: int, at: int) -> Pairs:
        target = self._stack[index] if index >= 0 else None
        if type(target) is not Pairs:
            self._refuse(at, "entries for something that is not a dict")
        return target

    def _set_item(self, at: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._pairs(len(self._stack) - 1, at).extend((key, value))
        return at + 1

    def _append(self, at: int) -> int:
        value, target = self._stack.pop(), self._stack[-1]
        if type(target) is not list:
            self._refuse(at, "an entry for something that is not a list")
        target.append(value)
        return at + 1

    def _append_all(self, at: int) -> int:
        start = self._marks.pop()
        target = self._stack[start - 1] if start else None
        if type(target) is not list:
            self._refuse(at, "entries for something that is not a list")
        target.extend(self._stack[start:])
        del self._stack[start:]
        return at + 1

    def _tuple(self, at: int) -> int:
        start = self._marks.pop()
        values = tuple(self._stack[start:])
        del self._stack[start:]
        return self._put_tuple(values, at)

    def _short_tuple(self, count: int, at: int) -> int:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise IndexError
        del self._stack[-count:]
        return self._put_tuple(values, at)

    def _put_tuple(self, values: tuple[Any, ...], at: int) -> int:
        """Pushes a tuple of plain values, or of tuples of them; deeper nesting is refused."""
        if len(values) > limits.METADATA_TUPLE:  # limits the cost of checking and copying it repeatedly
            self._refuse(at, "a tuple longer than any of a plan")
        for value in values:
            kind = type(value)
            if kind is not int and kind not in PLAIN and (kind is not tuple or tuple in map(type, value)):
                self._refuse(at, "a tuple of values that no plan has in one")
        self._stack.append(values)
        return at + 1

    def _refuse(self, at: int, what: str) -> NoReturn:
        raise PlanError(f"byte {at} (opcode {self._data[at]:#04x}): {what}")


OTHER_OPCODES: dict[int, Callable[[Interpreter, int], int]] = {
    0x80: Interpreter._protocol,
    0x95: Interpreter._frame,
    0x58: Interpreter._text,
    0x8A: Interpreter._integer,
    0x5D: Interpreter._empty_list,
    0x7D: Interpreter._empty_dict,
    0x81: Interpreter._new_object,
    0x93: Interpreter._name,
    0x52: Interpreter._call,
    0x62: Interpreter._build,
    0x73: Interpreter._set_item,
    0x61: Interpreter._append,
    0x65: Interpreter._append_all,
    0x74: Interpreter._tuple,
}
