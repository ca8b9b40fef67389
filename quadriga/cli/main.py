"""`quadriga COMMAND`: each command is one small file that parses, calls and prints. Loaded when it is asked for."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol

from quadriga import __version__
from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, Fault, Problem, UserError, nearest, printable, shortened

COMMANDS = {
    "train": "train from a TOML file on the ranks of this machine",
    "dry-run": "check a TOML file and say what the run would be; starts nothing, needs no GPU",
    "estimate": "say what each rank will hold and send, how long a step takes, and whether it fits; no GPU",
    "search": "rank every layout that fits so many devices by predicted speed",
    "equivalence": "train the debug model on many layouts and compare each with one process",
    "checkpoints": "list the checkpoints of a run, and verify them byte by byte",
    "convert": "write a checkpoint as a Hugging Face folder, or such a folder as a checkpoint",
    "bench": "run settings in turns, several times each, and compare them",
    "compare": "say which of two runs is faster, how sure that is, and where the time went",
    "trace": "say where the time of a profiled step went, and what each collective carried",
    "goodput": "say how much of a run's time trained, and what became of the rest",
    "ccl-bench": "write a run as a workload of CCL-Bench, or say what is wrong in such a workload",
    "keys": "explain the keys of the configuration",
    "card": "write the README.md of a configuration, or check that it is up to date",
    "docs": "write docs/configuration.md and all cards anew",
    "schema": "print the JSON Schema of the configuration, for editors",
    "version": "print the version",
}

# Of an operating system's call: what is wrong with the path that was given, not with the machine.
OF_THE_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}

USAGE = f"""usage: quadriga COMMAND [arguments]

Pre-training of Llama models from one TOML file.

{{commands}}

quadriga COMMAND --help says more of one of them.

  quadriga dry-run configs/llama3_8b/llama3_8b.toml --ngpu 4
  quadriga train configs/debug/debug.toml --ngpu 2 --training.steps 20
  quadriga keys checkpoint

Version {__version__}. The reference of all keys is docs/configuration.md."""


class Command(Protocol):
    """What each module of a command offers."""

    def main(self, argv: Sequence[str]) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (a fault, or something is out of date) or 2 (the user can mend it)."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help", "help"):
            print(_usage())
            return EXIT_OK
        if name in ("version", "--version"):
            print(__version__)
            return EXIT_OK
        if name not in COMMANDS:
            raise UserError(
                Problem(name, "no such command", allowed=", ".join(COMMANDS), nearest=nearest(name, COMMANDS))
            )
        command: Command = importlib.import_module(f"quadriga.cli.{name.replace('-', '_')}")
        return command.main(rest)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return EXIT_USAGE
    except Fault as fault:
        print(printable(f"quadriga: {fault}", keep="\n"), file=sys.stderr)
        return fault.exit_code
    except BrokenPipeError:  # the reader of our output has gone: `quadriga keys | head`
        sys.stderr.close()
        return EXIT_OK
    except OSError as error:
        if error.filename is None:
            raise
        what = f"cannot be used: {error.strerror}"
        print(UserError(Problem(shortened(str(error.filename), 400), what)).report, file=sys.stderr)
        return EXIT_USAGE if error.errno in OF_THE_PATH else EXIT_FAULT


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
