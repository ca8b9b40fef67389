"""What names data to read: token files, and the tables [[training.sources]] and [[training.stages]] of a mixture."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from quadriga.config.schema.section import Amount, Count, Name, NonNegative, Positive, Section, TokenCount

TokenFormat = Literal["auto", "quadriga", "megatron", "llmc", "raw", "npy", "parquet", "arrow"]
TokenType = Literal["uint16", "uint32", "int32", "int64", "uint8", "int8", "int16", "uint64"]
TOKENS = "tokens"  # the data set that is read from token files
TEXT_FIELD = "text"
NAME_CHARACTERS = 64  # of a source
NAME_FORM = f"letters of ASCII, digits, `_`, `.` and `-`, at most {NAME_CHARACTERS}"
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=NAME_CHARACTERS)]


class TokenKeys(NamedTuple):
    """How the token files at `path` are read: `format`, `dtype` and `eos_id` are `token_format`, `token_dtype` and
    `token_eos_id`; `field` is the column of Parquet and Arrow files, None if none is named. `table`: `training`,
    `validation` or a source, as `training.sources[NAME]`, for messages."""

    table: str
    path: str
    format: TokenFormat
    dtype: TokenType | None
    eos_id: int | None
    field: str | None


class TextKeys(NamedTuple):
    """Which texts are read, and how. `path` to `prompt` are `dataset_path`, `dataset_text_field` and so on. `table`:
    `training`, `validation` or a source, as `training.sources[NAME]`, for messages."""

    dataset: str
    path: str | None = None
    table: str = "training"
    field: str = TEXT_FIELD
    template: str | None = None
    config: str | None = None
    split: str | None = None
    streaming: bool = True
    prompt: str | None = None


def token_column(field: str) -> str | None:
    """The column of token ids; None for the default of texts."""
    return None if field == TEXT_FIELD else field


def title_of(dataset: str, path: str | None) -> str:
    """The name of a source that has none: the last part of its path without its suffix, else the data set."""
    for part in reversed(PurePath(path or "").parts):
        stem = PurePath(part.removesuffix(".gz").removesuffix(".zst")).stem
        if text := re.sub(r"[^A-Za-z0-9_.\-]+", "_", stem).strip("_.-"):  # a glob as *.jsonl has none
            return text[:NAME_CHARACTERS]
    return dataset


class DataSource(Section):
    """The keys of one data set, which `[training]` and its sources share."""

    dataset: Name
    """The data, as `training.dataset`."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files."""

    dataset_text_field: Name = TEXT_FIELD
    """The field of JSON lines, or the column of Parquet, Arrow and the Hub, that contains the documents or ids."""

    dataset_template: Name | None = None
    """Makes a document of several fields, as `"{title}\\n{text}"`; `{{` and `}}` are braces. It replaces the field."""

    dataset_prompt: Name | None = None
    """A template of what stands before the document, as `"{question}\\n"`. The loss does not count its tokens."""

    dataset_config: Name | None = None
    """The configuration of a data set of the Hub; none is its only one."""

    dataset_split: Name | None = None
    """The split of a data set; none is `train`."""

    dataset_streaming: bool = True
    """Stream a data set of the Hub; false downloads it once, and reads it from the disk."""

    token_format: TokenFormat = "auto"
    """The format of `tokens`; `auto` recognizes it by the content. `raw` are ids without a header."""

    token_dtype: TokenType | None = None
    """The integer type of `tokens` files without a header, which is never guessed. Other files state theirs."""

    token_eos_id: Amount | None = None
    """The id that ends a document in `tokens` files that have no index of documents."""

    @property
    def table(self) -> str:
        """The table of these keys in messages."""
        return "training"

    @property
    def text_keys(self) -> TextKeys:
        """How texts are read."""
        return TextKeys(
            self.dataset,
            self.dataset_path,
            self.table,
            self.dataset_text_field,
            self.dataset_template,
            self.dataset_config,
            self.dataset_split,
            self.dataset_streaming,
            self.dataset_prompt,
        )

    @property
    def token_keys(self) -> TokenKeys:
        """How `tokens` are read."""
        return TokenKeys(
            self.table,
            self.dataset_path or "",  # which `assets.dataset_problem` refuses
            self.token_format,
            self.token_dtype,
            self.token_eos_id,
            token_column(self.dataset_text_field),
        )


class TrainingSource(DataSource):
    """One source of a mixture. Exactly one of `weight`, `tokens` and `epochs` says how much of it is read."""

    name: SourceName | None = Field(None, title=NAME_FORM)
    """The name in messages and metrics; none is the last part of the path without its suffix, or the data set."""

    weight: NonNegative | None = None
    """The share of the windows, relative to the other weights. 0: only a later stage reads the source."""

    tokens: TokenCount | None = None
    """The tokens to read, relative to those of the other sources."""

    epochs: Positive | None = None
    """How often the source is read, relative to the other sources. Only token files have a known size."""

    @property
    def title(self) -> str:
        """`name`, or what stands for it by default."""
        return title_of(self.dataset, self.dataset_path) if self.name is None else self.name

    @property
    def table(self) -> str:
        return f"training.sources[{self.title}]"

    @property
    def amounts(self) -> dict[str, float]:
        """Which of `weight`, `tokens` and `epochs` are set, with their values."""
        given = {"weight": self.weight, "tokens": self.tokens, "epochs": self.epochs}
        return {name: value for name, value in given.items() if value is not None}


class MixtureStage(Section):
    """Other weights from `from_step` or `from_tokens` on, until the next stage. The weights of the sources themselves
    count before the first stage."""

    from_step: Count | None = None
    """The number of steps before the stage."""

    from_tokens: TokenCount | None = None
    """The tokens before the stage, rounded up to whole steps of `global_batch_size` x `seq_len` tokens."""

    weights: dict[str, NonNegative]
    """The weight of each source by its name; a source that is not named is not read."""

    def first_step(self, tokens_per_step: int) -> int:
        """The number of steps before the stage."""
        return self.from_step or -(-(self.from_tokens or 0) // tokens_per_step)
