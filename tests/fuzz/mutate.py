"""Seeded damage to bytes: what a fuzz case does to a sound file.

`damaged` picks one way by the random generator that it is given, so a case is known by its seed alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Values that readers were found to stumble over. Each stands where a JSON value may stand.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**9, 0.5, -0.0, 1e308, 1e-320),
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "nan",
        "null",
        "None",
        "../../etc/passwd",
        "/dev/zero",
        "a" * 5000,
        "\x00",
        "\x1b[2J\x07",
    ),
    *("<script>alert(1)</script>", "]]>", '"><img src=x onerror=alert(1)>', "\ud800", "\u202e", "1e999", "{}", "[]"),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": []}}, [{}], ["a"], {"0": 0}),
]

# Text that no JSON writer makes, and other bytes that parsers stumble over.
TOKENS: list[bytes] = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"0." + b"1" * 5000, b"1e-99999"),
    *(
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"\\",
        b'"',
        b"'",
        b"\n",
        b"\r",
    ),
    *(b"[" * 3000, b'{"a":' * 3000, b"[" * 200_000, b"]" * 300, b"}" * 300, b",,", b"::", b"=", b"#", b"\x1b[31m"),
    *(b"null", b"true", b"{}", b"[]", b"-", b"+", b".", b"e", b"a" * 100_000, b"\xe2\x80\xae", b"\x1f\x8b\x08\x00"),
]


def damaged(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    """`content` with one to three faults."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(WAYS)(content, rng, tokens)
    return content


def _json_value(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    """Another value in one place of a JSON document, or of one line of JSON lines."""
    try:
        return json.dumps(_changed(json.loads(content), rng)).encode()
    except (ValueError, RecursionError):
        pass
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = json.dumps(_changed(json.loads(lines[at]), rng)).encode()
    except (ValueError, RecursionError):
        return _bytes(content, rng, tokens)
    return b"\n".join(lines)


def _changed(document: Any, rng: random.Random) -> Any:
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys]
    if not places or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(VALUES))
    node, key = rng.choice(places)
    way = rng.random()
    if way < 0.2:
        del node[key]
    elif way < 0.3 and isinstance(node, dict):
        node[rng.choice(["", "x" * 300, "\x1b[1m", "__class__", key + "_"])] = node[key]
    elif way < 0.4 and len(places) > 1:
        node[key] = copy.deepcopy(_value_at(rng.choice(places)))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def _value_at(place: tuple[Any, Any]) -> Any:
    return place[0][place[1]]


def _bytes(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return (
        content[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + content[at + rng.randint(0, 8) :]
    )


def _flip(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _token(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(tokens) + content[at + rng.choice((0, 0, 1, 4)) :]


def _cut(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _drop(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.randint(1, 64) :]


def _repeat(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.randint(1, 200)]
    return content[:start] + piece * rng.choice((1, 2, 50)) + content[start:]


def _lines(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    way = rng.randrange(3)
    if way == 0:
        lines[a], lines[b] = lines[b], lines[a]
    elif way == 1:
        del lines[a]
    else:
        lines.insert(a, lines[b])
    return b"\n".join(lines)


def _nothing(content: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    return rng.choice((b"", b"\n", b"\x00" * 100, b"{}", b"[]", b"null", b"0", b"\xff" * 20))


Way = Callable[[bytes, random.Random, list[bytes]], bytes]
WAYS: list[Way] = [*([_json_value] * 5), *([_token] * 3), _bytes, _flip, _cut, _drop, _repeat, _lines, _nothing]
