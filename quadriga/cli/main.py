"""`quadriga COMMAND`: each command is one small module that parses, calls and prints. It is imported on demand."""

from __future__ import annotations

import importlib
import re
import signal
import sys
from collections.abc import Callable, Sequence

from quadriga import __version__
from quadriga.errors import EXIT_OK, EXIT_USAGE, Fault, Problem, UserError, nearest, printable
from quadriga.log import escape_unknown_characters
from quadriga.terminal import report_system_error

COMMANDS = {
    "train": "train from a TOML file on the ranks of this machine",
    "dry-run": "check a TOML file and print what the run would be; starts nothing, needs no GPU",
    "estimate": "estimate memory, communication and step time per rank, and whether it fits; needs no GPU",
    "search": "rank the layouts that fit on a number of devices by predicted speed",
    "equivalence": "train the debug model on many layouts and compare each with one process",
    "tokenize": "tokenize data of any format into shards that train without a tokenizer",
    "data": "report what is in data, and the documents and rows of any step of a run",
    "data fetch": "copy data from an object store or a web server, with hashes; continues after a kill",
    "checkpoints": "list the checkpoints of a run, and verify them byte by byte",
    "convert": "convert a checkpoint to Hugging Face or torchtitan, or from Hugging Face",
    "bench": "run several settings several times each, and compare them",
    "compare": "report which of two runs is faster, with an interval, and where the time was spent",
    "trace": "report where the time of a profiled step was spent, and the traffic of each collective",
    "goodput": "report how much of a run's time trained, and what the rest was spent on",
    "ccl-bench": "write a run as a workload of CCL-Bench, or report mistakes in such a workload",
    "configs": "list the configurations that Quadriga ships, print the path of one, or copy them",
    "keys": "explain the keys of the configuration",
    "card": "generate the README.md of a configuration, or check that it is up to date",
    "docs": "generate docs/configuration.md, docs/cli.md, tables of docs/from-torchtitan.md and all cards",
    "schema": "print the JSON Schema of the configuration, for editors",
    "version": "print the version",
}

# Commands that share a module: the module and its function. The others are `main` of a module of their name.
SHARED = {"dry-run": ("train", "dry_run"), "docs": ("card", "docs"), "schema": ("keys", "schema")}

USAGE = f"""usage: quadriga COMMAND [arguments]

Pre-training of Llama models from one TOML file.

{{commands}}

quadriga COMMAND --help explains a command.

  quadriga dry-run configs/llama3_8b/llama3_8b.toml --ngpu 4
  quadriga train configs/debug/debug.toml --ngpu 2 --training.steps 20
  quadriga keys checkpoint

Version {__version__}. The reference of all keys is docs/configuration.md."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 (an error of the user), or that of the fault (1 if out of date)."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    escape_unknown_characters()
    try:
        code = _run(name, rest)
        if sys.stdout is not None:  # None: it was closed before the start
            sys.stdout.flush()
        return code
    except UserError as error:
        print(error.report, file=sys.stderr)
        return EXIT_USAGE
    except Fault as fault:
        print(printable(f"quadriga: {fault}", keep="\n"), file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("quadriga: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (OSError, UnicodeEncodeError) as error:
        return report_system_error(error)


def _run(name: str, rest: Sequence[str]) -> int:
    if name in ("-h", "--help", "help"):
        print(_usage())
        return EXIT_OK
    if name in ("version", "--version"):
        print(__version__)
        return EXIT_OK
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        raise UserError(Problem(name, "no such command", allowed=", ".join(COMMANDS), nearest=nearest(name, COMMANDS)))
    return function_of(name)(rest)


def function_of(name: str) -> Callable[[Sequence[str]], int]:
    """The function of a command. It takes the arguments after the name, and returns the exit code."""
    module, function = SHARED.get(name, (re.sub("[ -]", "_", name), "main"))
    found: Callable[[Sequence[str]], int] = getattr(importlib.import_module(f"quadriga.cli.{module}"), function)
    return found


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()))
