"""Files of token ids: found, opened, and read as one sequence of ids. No tokenizer is needed."""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quadriga.data.files import MOST_PROBLEMS, File, find_files, fingerprint
from quadriga.data.recognize import MEGATRON_MAGIC, OLD_MEGATRON_MAGIC
from quadriga.data.shards import MadeBy, ShardFile, ShardManifest, manifests_of, open_shard
from quadriga.data.stored_arrays import OpenFiles, path_of
from quadriga.data.token_arrow import open_arrow
from quadriga.data.token_columns import ColumnFile
from quadriga.data.token_formats import (
    FORMAT_NAMES,
    HEAD_BYTES,
    TOKEN_DTYPES,
    Documents,
    TokenFile,
    TokenOptions,
    open_llmc,
    open_megatron,
    open_npy,
    open_raw,
    recognized_format,
)
from quadriga.data.token_ids import checked_ids, location_of, wrong_ids
from quadriga.data.token_parquet import DecodedGroups, open_parquet_tokens
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.reading import file_kind

TOKEN_FORMATS = ("auto", *FORMAT_NAMES)
SUFFIXES = (".bin", ".idx", ".npy", ".parquet", ".arrow")  # of the files that are read from a folder
OPENED_AT_ONCE = 4  # threads that read headers, because network file systems have latency
OPENED_IN_A_ROW = 64  # files of one thread, because a file on a local disk takes less time than to wake a thread
Opened = tuple[str, TokenFile]  # the format of a file, and the file


class TokenFiles:
    """Files of token ids as one sequence of ids, file after file. Any thread can read any part.

    `files` are the data files, without the indexes of Megatron, and `length` is the number of ids in all of them.
    `made_by` is the tokenizer of the ids, if the files state it.

    `fingerprint` identifies the data: one word without `;`, equal for equal data in any place. It is made of the names
    and sizes of the files and their indexes, their format and dtypes, the column, what separates documents, and the
    hashes of shards.
    """

    def __init__(self, parts: Sequence[TokenFile], files: OpenFiles, fingerprint: str, eos_id: int | None) -> None:
        self.files: tuple[File, ...] = tuple(part.file for part in parts)
        self.fingerprint = fingerprint
        self.made_by: MadeBy | None = next((part.made_by for part in parts if isinstance(part, ShardFile)), None)
        self._parts, self._open, self._eos = parts, files, eos_id
        self._starts = list(accumulate((part.length for part in parts), initial=0))
        self.length = self._starts[-1]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids [start, stop), in a new array.

        Raises:
            ValueError: not 0 <= start <= stop <= length.
            UserError: a file cannot be read or was changed, or an id is negative or above int64.
        """
        pieces = [checked_ids(self._parts[index], first, last) for index, first, last in self._split(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, np.int64)])

    def documents(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The documents that ids [start, stop) are from, in order, as (index of the file, number in the file).

        The number is that of the index: of the document for Megatron, and of the row for lists of ids. Where `eos_id`
        separates documents, none has a number without reading the file from its start. The number is then the position
        in the file of the document's first id within [start, stop). Empty if nothing separates documents.

        Raises:
            ValueError, UserError: as `read`, or an index is damaged.
        """
        return tuple(
            (index, number)
            for index, first, last in self._split(start, stop)
            for number in self._documents(index, first, last).numbers.tolist()
        )

    def borders(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The positions in (start, stop] at which a document ends, relative to `start`; each is the number of ids
        before the end. Empty if nothing separates documents.

        With an index, the end of a file ends a document. With `eos_id` only, documents can go on in the next file.

        Raises:
            ValueError, UserError: as `documents`.
        """
        found = []
        for index, first, last in self._split(start, stop):
            ends = self._documents(index, first, last).ends
            found.append(ends[ends <= last] + (self._starts[index] - start))
        return np.concatenate([*found, np.empty(0, np.int64)])

    def read_documents(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], tuple[tuple[int, int], ...], npt.NDArray[np.int64]]:
        """`read`, `documents` and `borders` of the same ids, which are read once."""
        ids, names, ends = [], list[tuple[int, int]](), []
        for index, first, last in self._split(start, stop):
            ids.append(checked_ids(self._parts[index], first, last))
            found = self._documents(index, first, last, ids[-1])
            names += [(index, number) for number in found.numbers.tolist()]
            ends.append(found.ends[found.ends <= last] + (self._starts[index] - start))
        if len(ids) == 1:
            return ids[0], tuple(names), ends[0]
        none = np.empty(0, np.int64)
        return np.concatenate([*ids, none]), tuple(names), np.concatenate([*ends, none])

    @property
    def separates_documents(self) -> bool:
        """Whether an index or `eos_id` separates documents in every file."""
        return self._eos is not None or all(part.indexed for part in self._parts)

    def parts(self, start: int, stop: int) -> list[tuple[tuple[int, int] | None, int, int]]:
        """Ids [start, stop) by document: the document as `documents` names it, its first id of the range, and the one
        after its last. A part of a file in which nothing separates documents has the document None.

        Raises:
            ValueError, UserError: as `documents`.
        """
        found: list[tuple[tuple[int, int] | None, int, int]] = []
        for index, first, last in self._split(start, stop):
            (numbers, ends), base = self._documents(index, first, last), self._starts[index]
            edges = [first, *ends[ends < last].tolist(), last]
            names: Sequence[tuple[int, int] | None] = [(index, number) for number in numbers.tolist()] or [None]
            found += [(name, base + edges[i], base + edges[i + 1]) for i, name in enumerate(names)]
        return found

    def format_location(self, position: int) -> str:
        """The location of an id for a message: the file, and the position of the id in it, counted from 0."""
        index, first, _ = self._split(position, position + 1)[0]
        return location_of(self._parts[index], first)

    def verify(self, vocab_size: int | None) -> Iterator[Problem]:
        """Reads everything, and yields what is wrong: ids outside of [0, vocab_size), entries of indexes, unreadable
        files. At most some problems for each file. Memory does not grow with the data."""
        for part in self._parts:
            try:
                yield from wrong_ids(part, vocab_size)
                yield from part.index_problems()
            except UserError as error:
                yield from error.problems

    def close(self) -> None:
        """Closes the files. Reading afterwards raises ValueError."""
        self._open.close()

    def _split(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Index of the file, first id and id after the last one within it, of each file that has ids of the range."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"ids [{start}, {stop}) are not within [0, {self.length})")
        index = bisect_right(self._starts, start) - 1
        found = []
        while start < stop:
            begin, end = self._starts[index], min(stop, self._starts[index + 1])
            if start < end:
                found.append((index, start - begin, end - begin))
            start, index = end, index + 1
        return found

    def _documents(self, index: int, start: int, stop: int, ids: npt.NDArray[np.int64] | None = None) -> Documents:
        """As `TokenFile.documents`; with `eos_id`, the last document has an end only if it is within the range. `ids`:
        those of the range, if they were read."""
        part = self._parts[index]
        if part.indexed:
            return part.documents(start, stop)
        if self._eos is None:
            return Documents(np.empty(0, np.int64), np.empty(0, np.int64))
        ends = start + 1 + np.flatnonzero((part.read(start, stop) if ids is None else ids) == self._eos)
        begins = np.concatenate([[start], ends])
        return Documents(begins[begins < stop], ends)


def open_token_files(
    path: str,
    *,
    token_format: str = "auto",
    token_dtype: str | None = None,
    eos_id: int | None = None,
    field: str | None = None,
    key: str = "training",
) -> TokenFiles:
    """Opens the token files of a file, a folder (with its sub-folders) or a glob, in the order of their names.

    A pair of Megatron can also be named by its `.idx`, or by its path without a suffix.

    Args:
        token_format: one of `TOKEN_FORMATS`; `auto` finds out by the content. All files have the same.
        token_dtype: the type of the ids of headerless files; for others it must be the one that the file names.
        eos_id: the id that ends a document. It counts for files without an index of documents.
        field: the column of Parquet and Arrow files; None is `input_ids`, or the only one with integers.
        key: the section of the configuration that names the files, for messages.

    Raises:
        UserError: nothing is found, or files cannot be read, with one problem for each.
    """
    if problems := list(_wrong_options(token_format, token_dtype, key)):
        raise UserError(*problems)
    options = TokenOptions(token_format, token_dtype, field, key)
    data = _data_files(path, key)
    manifests = manifests_of(data, whole=Path(path).expanduser().is_dir())
    files, decoded = OpenFiles(), DecodedGroups()
    try:
        found = _open_all(partial(_opened, files, decoded, options, manifests), data)
        _require_one_format(found, path, key)
        parts = [part for _, part in found]
        _require_one_tokenizer(parts, path, key)
        if not any(part.length for part in parts):
            raise UserError(Problem(f"{key}.dataset_path", "the files have no token id", path))
        return TokenFiles(parts, files, _fingerprint(found[0][0], parts, eos_id), eos_id)
    except BaseException:
        files.close()
        raise


def _wrong_options(token_format: str, token_dtype: str | None, key: str) -> Iterator[Problem]:
    chosen = {"token_format": (token_format, TOKEN_FORMATS), "token_dtype": (token_dtype, TOKEN_DTYPES)}
    for name, (value, allowed) in chosen.items():
        if value is not None and value not in allowed:
            close = nearest(value, allowed)
            yield Problem(f"{key}.{name}", "there is no such value", value, allowed=", ".join(allowed), nearest=close)


def _data_files(path: str, key: str) -> tuple[File, ...]:
    """The data files of a path, without the indexes of Megatron. Raises UserError."""
    named = Path(path).expanduser()
    if named.suffix == ".idx" and os.path.isfile(named):
        named = named.with_suffix(".bin")
    elif not os.path.exists(named):
        pair = [f"{named}{suffix}" for suffix in (".bin", ".idx")]
        named = Path(pair[0]) if any(map(os.path.isfile, pair)) else named
    if named.suffix == ".bin" and not os.path.exists(named) and os.path.isfile(named.with_suffix(".idx")):
        raise UserError(_without_data(str(named.with_suffix(".idx")), named))
    found = find_files("token", str(named), f"{key}.dataset_path", suffixes=SUFFIXES)
    names = {file.name for file in found}
    if caches := [f for f in found if f.name.endswith(".arrow") and f.path.name.startswith("cache-")]:
        what = f"is a cache of the library `datasets`, one of {len(caches):,}, next to its data"
        fix = "remove it, or name the data files by a glob (data-*.arrow)"
        raise UserError(Problem(path_of(caches[0]), what, fix=fix))
    lone = [f for f in found if f.path.suffix == ".idx" and str(Path(f.name).with_suffix(".bin")) not in names]
    if lone:
        raise UserError(*(_without_data(path_of(f), f.path.with_suffix(".bin")) for f in lone[:MOST_PROBLEMS]))
    return tuple(file for file in found if not file.name.endswith(".idx"))


def _without_data(index: str, data: Path) -> Problem:
    name = shortened(data.name)
    if data.is_file():
        return Problem(index, f"the index is named without its data file {name}", fix="name data files (*.bin)")
    fix = "copy the file to there, or name the data files by a glob (*.bin)"
    return Problem(index, f"the index has no data file {name} next to it", fix=fix)


def _open_all(open_one: Callable[[File], Opened | UserError], data: Sequence[File]) -> list[Opened]:
    """Raises UserError with the problems of all files, up to MOST_PROBLEMS. Then no other file is opened, because each
    that cannot be read takes some seconds."""
    found: list[Opened] = []
    problems: list[Problem] = []
    groups = [data[start : start + OPENED_IN_A_ROW] for start in range(0, len(data), OPENED_IN_A_ROW)]
    with ThreadPoolExecutor(min(OPENED_AT_ONCE, len(groups))) as pool:
        for future in [pool.submit(_open_group, open_one, group) for group in groups]:
            opened, refused = future.result()
            found, problems = found + opened, problems + refused
            if len(problems) >= MOST_PROBLEMS:
                pool.shutdown(cancel_futures=True)
                break
    if problems:
        raise UserError(*problems[:MOST_PROBLEMS])
    return found


def _open_group(
    open_one: Callable[[File], Opened | UserError], group: Sequence[File]
) -> tuple[list[Opened], list[Problem]]:
    """Up to MOST_PROBLEMS problems."""
    found: list[Opened] = []
    problems: list[Problem] = []
    for file in group:
        if isinstance(each := open_one(file), UserError):
            problems += each.problems
        else:
            found.append(each)
        if len(problems) >= MOST_PROBLEMS:
            break
    return found, problems


def _opened(
    files: OpenFiles, decoded: DecodedGroups, options: TokenOptions, manifests: Mapping[Path, ShardManifest], file: File
) -> Opened | UserError:
    """The format of a file, and the file. `manifests`: of the folders of shards."""
    try:
        index = _index_of(file)
        if (manifest := manifests.get(file.path.parent)) is not None:
            if options.token_format not in ("auto", "quadriga"):
                raise UserError(_other_format(file, "quadriga", options))
            return "quadriga", open_shard(files, file, index, manifest, options)
        magic = files.read(index, 0, min(len(MEGATRON_MAGIC), index.size)) if index else b""
        if not file.size and index is None:
            raise UserError(Problem(path_of(file), "the file is empty", fix="copy it again, or remove it"))
        pair = magic.startswith((MEGATRON_MAGIC, OLD_MEGATRON_MAGIC))
        form = "megatron" if pair else recognized_format(files.read(file, 0, min(HEAD_BYTES, file.size)))
        if options.token_format not in ("auto", form):
            raise UserError(_other_format(file, form, options))
        if index is not None and pair:
            return form, open_megatron(files, file, index, options)
        if index is not None and form == "raw" and options.token_format == "auto":
            what = f"the file is not an index of Megatron, and is next to {shortened(file.path.name)}"
            fix = f"copy the index again, or set {options.key}.token_format to raw, without documents"
            raise UserError(Problem(path_of(index), what, fix=fix))
        if form == "parquet":
            return form, open_parquet_tokens(decoded, file, options)
        return form, {"llmc": open_llmc, "npy": open_npy, "arrow": open_arrow, "raw": open_raw}[form](
            files, file, options
        )
    except UserError as error:
        return error


def _index_of(file: File) -> File | None:
    """The `.idx` next to a `.bin`. Raises UserError if it is no file that can be read."""
    if not file.name.endswith(".bin"):
        return None
    path = f"{str(file.path)[:-4]}.idx"
    try:
        status = os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            return None
        what = f"is {file_kind(stat.S_IFLNK)}"
        raise UserError(Problem(shortened(path, 400), what, fix="restore its target, or remove it")) from error
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        what = f"is {file_kind(status.st_mode)}, not a regular file"
        raise UserError(Problem(shortened(path, 400), what, fix="move it away"))
    return File(Path(path), os.path.basename(path), status.st_size, compressed=False)


def _other_format(file: File, form: str, options: TokenOptions) -> Problem:
    wanted = options.token_format
    if wanted == "megatron" and form == "raw" and file.path.suffix == ".bin":
        what, fix = f"there is no index of Megatron next to it ({file.path.stem}.idx)", "copy the index there"
        return Problem(path_of(file), what, fix=f"{fix}, or set {options.key}.token_format to raw, without documents")
    also = f", and {options.key}.token_dtype to the type of its ids" if form == "raw" else ""
    what = f"is {FORMAT_NAMES[form]}, not {FORMAT_NAMES[wanted]}"
    return Problem(path_of(file), what, fix=f"set {options.key}.token_format to {form}{also}")


def _require_one_format(found: Sequence[Opened], path: str, key: str) -> None:
    examples: dict[str, str] = {}
    for form, part in found:
        examples.setdefault(form, part.file.name)
    if len(examples) > 1:
        what = "; ".join(f"{shortened(name)} is {FORMAT_NAMES[form]}" for form, name in examples.items())
        fix = "name the files of one format by a glob"
        raise UserError(Problem(f"{key}.dataset_path", f"the files have several formats: {what}", path, fix=fix))


def _require_one_tokenizer(parts: Sequence[TokenFile], path: str, key: str) -> None:
    if len(made_by := {part.made_by.fingerprint for part in parts if isinstance(part, ShardFile)}) > 1:
        what = f"the shards were made by several tokenizers: {', '.join(sorted(made_by))}"
        fix = "name the folder of one tokenizer"
        raise UserError(Problem(f"{key}.dataset_path", what, path, fix=fix))


def _fingerprint(form: str, parts: Sequence[TokenFile], eos_id: int | None) -> str:
    dtypes = "+".join(sorted({part.dtype.str.lstrip("<|") for part in parts}))
    columns = "+".join(sorted({part.column.name for part in parts if isinstance(part, ColumnFile)}))
    column = f":{columns.replace(';', '_')}" if columns else ""
    eos = "" if eos_id is None or all(part.indexed for part in parts) else f":eos{eos_id}"
    hashes = "".join(part.digest for part in parts)
    digest = f":{hashlib.blake2b(hashes.encode(), digest_size=8).hexdigest()}" if hashes else ""
    files = [file for part in parts for file in (part.file, part.index) if file is not None]
    return fingerprint(f"tokens:{form}:{dtypes}", files) + column + eos + digest
