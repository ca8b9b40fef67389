"""`quadriga data WHAT`: what is in data, and what a model sees of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from quadriga.cli.arguments import Parser, count, run_from_file
from quadriga.cli.sources import ARGUMENTS, add_text_arguments, arguments_in_messages, data_named, text_keys
from quadriga.config.assets import BUILTIN_TOKENIZER
from quadriga.config.schema import TOKENS, Dataloader, TextKeys, TokenKeys
from quadriga.config.schema.sources import TokenFormat, TokenType
from quadriga.errors import EXIT_OK, EXIT_USAGE, Problem, UserError, printable
from quadriga.units import format_count, plural

if TYPE_CHECKING:
    from quadriga.data.contents import Contents
    from quadriga.data.rows import RowPart
    from quadriga.data.tokenizer import Tokenizer

ABOUT = (
    "Report the files, documents, tokens and lengths of data, bad records, and the first rows as text. WHAT is a TOML "
    "file, a run folder, or data: a file, a folder, a glob, or a data set without a path. Large data are sampled, "
    "unless --verify is given. With --step, report the documents and rows of a step of a run instead."
)
BAR = 40  # characters of the longest bar of the histogram


@dataclass(frozen=True)
class DataChoice:
    """Which data are read, and how. `assets`: None without a tokenizer."""

    keys: TextKeys | TokenKeys
    assets: str | None
    seq_len: int
    overlap: int = 1
    vocab_size: int | None = None
    packing: str = "concat"


def main(argv: Sequence[str]) -> int:
    parser = Parser("data", ABOUT)
    parser.add_argument("what", metavar="WHAT", help="a TOML file, a run folder, or data")
    parser.add_argument("--step", type=count, metavar="N", help="with a run folder: the documents and rows of step N")
    parser.add_argument("--verify", action="store_true", help="read everything, with the hashes of shards")
    parser.add_argument("--rows", type=count, default=2, metavar="N", help="rows that are shown (default: 2)")
    parser.add_argument("--full", action="store_true", help="show the whole text of rows")
    parser.add_argument("--dataset", metavar="NAME", help="text, jsonl, tokens, ...; by default by the names of files")
    parser.add_argument("--field", metavar="NAME", help="the field or column of the documents or ids")
    add_text_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="as model.hf_assets_path (default: bytes; ids of tokens)")
    parser.add_argument("--seq-len", type=count, default=256, metavar="N", help="ids of a row (default: 256)")
    parser.add_argument("--token-format", choices=get_args(TokenFormat), default="auto", help="as in the configuration")
    parser.add_argument("--token-dtype", choices=get_args(TokenType), help="as in the configuration")
    parser.add_argument("--token-eos-id", type=int, metavar="ID", help="as in the configuration")
    chosen = parser.parse_args(argv)
    folder = Path(chosen.what)
    is_run = (folder / "config.toml").is_file()
    if chosen.step is not None:
        if not is_run:
            what = "is not a run folder, which has a config.toml"
            raise UserError(Problem("WHAT", what, chosen.what, fix="name the folder of a run (job.dump_folder)"))
        from quadriga.cli.data_step import report_step

        return report_step(folder, chosen.step, chosen.rows, chosen.full)
    of_run = is_run or chosen.what.endswith(".toml")
    with arguments_in_messages({} if of_run else ARGUMENTS):
        choices = _of_configuration(folder / "config.toml" if is_run else folder) if of_run else [_of_arguments(chosen)]
        codes = [report_data(choice, whole=chosen.verify, rows=chosen.rows, full=chosen.full) for choice in choices]
        return max(codes)


def _of_configuration(file: Path) -> list[DataChoice]:
    """The data of a run. Of a mixture: each source, after the mixture was printed."""
    from quadriga.data.data_check import describe_data

    run = run_from_file(str(file), None)
    training, spec = run.config.training, run.spec
    overlap, size = training.dataloader.window_overlap, spec.model.vocab_size
    choices = []
    for section in training.sources or (training,):
        keys = section.token_keys if section.dataset == TOKENS else section.text_keys
        choices.append(DataChoice(keys, spec.tokenizer.assets, spec.seq_len, overlap, size, training.packing))
    if training.sources:
        print("\n".join(map(printable, ["mixture", *describe_data(training, spec), ""])))
    return choices


def _of_arguments(chosen: Namespace) -> DataChoice:
    options = vars(chosen)
    dataset, path = data_named(options["what"], options["dataset"], lambda name: True)
    if dataset != TOKENS:
        assets = options["tokenizer"] or BUILTIN_TOKENIZER
        return DataChoice(text_keys(dataset, path, chosen), assets, options["seq_len"])
    how = options["token_format"], options["token_dtype"], options["token_eos_id"], options["field"]
    keys = TokenKeys("training", path or "", *how)
    return DataChoice(keys, options["tokenizer"], options["seq_len"])


def report_data(choice: DataChoice, *, whole: bool, rows: int, full: bool) -> int:
    """Print the report. Returns the exit code: 2 if something is wrong in the data."""
    from quadriga.cli.data_rows import format_row
    from quadriga.data.tokenizer import build_tokenizer

    tokenizer = None if choice.assets is None else build_tokenizer(choice.assets)
    if isinstance(choice.keys, TokenKeys):
        place = f"{TOKENS} from {choice.keys.path}"
        names, found, shown = _read_tokens(choice.keys, choice, tokenizer, whole, rows)
    else:
        assert tokenizer is not None
        place = choice.keys.dataset if choice.keys.path is None else f"{choice.keys.dataset} from {choice.keys.path}"
        names, found, shown = _read_text(choice.keys, choice, tokenizer, whole, rows)
    lines = [f"data         {place}", f"files        {names}", *format_contents(found)]
    for number, row in enumerate(shown):
        lines += ["", f"row {number} in the order of the data", *format_row(row, tokenizer, full)]
    if found.problems:
        lines += ["", f"{plural(max(found.bad, len(found.problems)), 'problem')}, the first of them:"]
    print("\n".join(map(printable, lines)))
    for problem in found.problems:
        print(f"\n{problem}")
    return EXIT_USAGE if found.problems else EXIT_OK


def _read_tokens(
    keys: TokenKeys, choice: DataChoice, tokenizer: Tokenizer | None, whole: bool, rows: int
) -> tuple[str, Contents, list[list[RowPart]]]:
    from quadriga.data.contents import contents_of_tokens
    from quadriga.data.rows import token_row
    from quadriga.data.token_data import open_tokens

    order = Dataloader(shuffle=False, window_overlap=choice.overlap)
    files, windows = open_tokens(keys, order, choice.seq_len, None, assets=choice.assets)
    size = choice.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if size is None and files.made_by is not None:
        size = files.made_by.vocab_size
    found = contents_of_tokens(files, size, whole=whole)
    shown = [token_row(files, windows, slot) for slot in range(min(rows, windows.count))]
    return f"{len(files.files):,}, with {plural(files.length, 'id')}", found, shown


def _read_text(
    keys: TextKeys, choice: DataChoice, tokenizer: Tokenizer, whole: bool, rows: int
) -> tuple[str, Contents, list[list[RowPart]]]:
    from quadriga.data.catalogue import open_source
    from quadriga.data.contents import contents_of_text
    from quadriga.data.rows import text_rows
    from quadriga.data.streams import Streams

    source = open_source(keys)
    found = contents_of_text(source, tokenizer, whole=whole)
    how: dict[str, Any] = {"endless": False, "skip_bad": True, "overlap": choice.overlap, "packing": choice.packing}
    streams = Streams(source, tokenizer, choice.seq_len, 1, None, **how)
    try:
        shown = list(islice(text_rows(streams, 0), rows))
    except UserError as error:  # of a damaged file
        shown = []
        found.add_problems(error.problems)
    return f"{len(source.files):,}" if source.files else f"{plural(source.shards, 'shard')}", found, shown


def format_contents(found: Contents) -> Iterator[str]:
    """Counts, and a histogram of lengths, as text lines."""
    sample = "" if found.whole else " in a sample (--verify reads everything)"
    yield f"documents    {found.documents:,}{sample}"
    yield f"tokens       {found.tokens:,}{sample}"
    yield f"bad records  {found.bad:,}{sample}"
    if found.lengths:
        yield ""
        yield "documents by their number of tokens"
        most = max(found.lengths.values())
        for least, number in sorted(found.lengths.items()):
            name = f"{least:,} to {2 * least - 1:,}" if least > 1 else f"{least}"
            yield f"  {name:>24}  {'#' * -(-BAR * number // most):<{BAR}}  {format_count(number)}"
