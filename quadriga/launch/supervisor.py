"""The launcher: all checks before the launch, then torchrun as a child process, its signals, and the last error.

It exists because torchrun turns a rank's exit code 2 into 1 with its own traceback, repeats a report once per rank, and
leaves ranks alive when it is killed. No torch is imported, so a wrong configuration is refused in a fraction of a
second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quadriga.checkpoint.folder import CheckpointError, newest_extra
from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import VARIABLE as SYMMETRIC_SIZE
from quadriga.comm.heap import symmetric_size
from quadriga.comm.network import INTERFACE_VARIABLES, format_ports, loopback_variables
from quadriga.config import Run, read
from quadriga.config.variables import variables_help
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.launch.agent import LAUNCHER_PID, TORCHRUN_SIGNAL
from quadriga.launch.dry_run import StartCheck, format_dry_run
from quadriga.launch.environment import (
    LOOPBACK_RENDEZVOUS,
    LaunchRequest,
    launch_backend,
    rank_environment,
    read_launch_request,
    torch_build,
    visible_gpus,
)
from quadriga.launch.exit_status import report_exit
from quadriga.launch.start_check import find_start
from quadriga.log import escape_unknown_characters, logger, start_logging
from quadriga.models.registry import catalogue
from quadriga.planning.communication import heap_of
from quadriga.resilience.processes import RECORDS, SAVE_SIGNAL, STOP_SIGNALS, adopt_orphans, signal_handlers
from quadriga.terminal import report_system_error

ORPHAN_SECONDS = 5.0  # for children of the ranks to end after the ranks

REHEARSE = "--rehearse"
USAGE = f"""usage: [NGPU=4] [CONFIG_FILE=FILE] ./run_train.sh [--section.key value ...]
       python -m quadriga.launch --job.config_file FILE [--section.key value ...]

Trains on the ranks of this machine from one TOML file. You can give every key on the command line, as
--section.key value, --section.key=value, or --section.no_key for a switch. The command line overrides the environment,
and the environment overrides the file.

Environment variables:
{variables_help()}

DRY_RUN=1 also prints where the run would resume, and returns the exit code of such a start. With --rehearse, it also
builds the run and takes one step without memory.

On one machine every port is opened on the loopback: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and
NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME name that interface unless you set them. Several machines need a closed network.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP: the run finishes the step, saves, and exits with 75. A second Ctrl-C ends
it at once. SIGUSR2: the run saves and continues. The files STOP and SAVE in the run folder do the same.

Exit codes:
  0    done
  1    a fault of the machine or the code
  2    an error that you can correct; one report lists all of them
  3    every checkpoint is damaged, or one is invalid although its hashes are right
  4    a rank stopped, or a collective timed out
  5    the loss or the gradients are NaN or infinite, or the loss jumped, and [health] says to stop
  6    out of memory
  75   stopped on request, after a save: the same command resumes, so a scheduler can requeue it
  128 + n   ended by signal n, with nothing saved
docs/operations.md says what to do about each.
"""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Launch the run of `argv` and `environ`. Returns the exit code of `USAGE`; 128 + n if signal n ended the run."""
    if {"-h", "--help"} & set(argv):
        from quadriga.config.reference import print_keys  # imports rich, which a start does not need

        print(USAGE)
        print_keys()
        return EXIT_OK
    escape_unknown_characters()
    try:
        argv, rehearsal = split_rehearse_flag(argv)
        request, run = check_before_launch(argv, environ)
        if request.dry_run or run.config.only_rehearses:
            ready, ports = check_start(request, run, argv, environ), format_ports(environ, request.nodes)
            print(printable(format_dry_run(run, ready, ports), keep="\n"), flush=True)
            wanted = rehearsal or run.config.only_rehearses
            return run_rehearsal(run, launch_arguments(argv, environ), environ) if wanted else ready.code
        if rehearsal:
            raise UserError(Problem(REHEARSE, "a rehearsal is part of a dry run", fix="set DRY_RUN=1"))
        start_logging({**environ, "RANK": "0", "LOG_RANK": "0"})
        if request.node == 0:  # its first rank searches for checkpoints; other machines may not see them
            find_start(run, deep=False)
        gpus = visible_gpus(environ)
        backend, reason = launch_backend(run.spec.backend, request.ranks, torch_build(), gpus)
        heap = heap_variables(run, environ)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return error.exit_code
    except CheckpointError as error:
        print(printable(error, keep="\n"), file=sys.stderr)
        return error.exit_code
    except (OSError, UnicodeEncodeError) as error:
        return report_system_error(error)
    loopback = loopback_variables(environ, request.nodes)
    rank_variables = rank_environment(environ, request) | loopback | heap
    logger.info("%s over %s (%s)", _format_ranks(request), backend, reason)
    if len(loopback) < len(INTERFACE_VARIABLES):
        logger.info("ports: %s", format_ports(environ, request.nodes))
    for name, size in heap.items():
        logger.info("%s=%s%s", name, size, "" if environ.get(name) else ": what this run needs")
    # Every rank takes the backend that is chosen here, or fails. No rank chooses again.
    environ = {**environ, **rank_variables, "COMM_BACKEND": backend}
    return supervise(request, launch_arguments(argv, environ), environ, run.config.checkpoint.timeout_seconds)


def split_rehearse_flag(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The command line without `--rehearse`, and whether it was there."""
    return [word for word in argv if word != REHEARSE], REHEARSE in argv


def run_rehearsal(run: Run, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Build a rank of the run and take one step in a child process, on fake tensors. Returns its exit code.

    Rehearses rank 0 and, in a pipeline, the last rank, because it has another stage.
    """
    ranks = (0,) if run.spec.degrees.pp == 1 else (0, run.spec.world_size - 1)
    shared = {**environ, "PYTHONPATH": python_path(environ), "WORLD_SIZE": str(run.spec.world_size)}
    print("\nRehearsal (tensors without memory, nothing is sent):", flush=True)
    for rank in ranks:
        command = [sys.executable, "-m", "quadriga.rehearsal.rehearse", *argv]
        code = subprocess.run(command, env={**shared, "RANK": str(rank)}, check=False).returncode
        if code != EXIT_OK:
            return code
    return EXIT_OK


def check_before_launch(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[LaunchRequest, Run]:
    """The launch request and the run. Raises UserError with all problems of the variables and the configuration."""
    request, problems = read_launch_request(environ)
    try:
        run = resolve_run(request, argv, environ, training=not request.dry_run)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return request, run


def resolve_run(request: LaunchRequest, argv: Sequence[str], environ: Mapping[str, str], training: bool) -> Run:
    """The run on all ranks of all machines. `training`: also require what a dry run does not need."""
    return read(
        launch_arguments(argv, environ),
        environ,
        catalogue=catalogue(),
        backends=BACKENDS,
        world_size=request.world_size,
        training=training,
        saved=newest_extra,
    )


def check_start(request: LaunchRequest, run: Run, argv: Sequence[str], environ: Mapping[str, str]) -> StartCheck:
    """Why a start would refuse this run, or where it would begin. Empty if the run only rehearses."""
    if run.config.only_rehearses:
        return StartCheck()
    problems = training_problems(request, argv, environ)
    try:
        return StartCheck(problems, start=find_start(run, deep=True))
    except UserError as error:
        reported = {(problem.where, problem.what) for problem in problems}
        more = [problem for problem in error.problems if (problem.where, problem.what) not in reported]
        return StartCheck((*problems, *more))
    except CheckpointError as fault:
        return StartCheck(problems, fault)


def training_problems(request: LaunchRequest, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Problem, ...]:
    """Problems that only training has: missing assets and unsupported features. A dry run reports them as notices."""
    try:
        heap_variables(resolve_run(request, argv, environ, training=True), environ)
    except UserError as error:
        return error.problems
    return ()


def heap_variables(run: Run, environ: Mapping[str, str]) -> dict[str, str]:
    """NVSHMEM's heap size as a variable; empty without NVSHMEM. Raises UserError if the user's value is too small."""
    heap = heap_of(run) if run.spec.backend == "nvshmem" else None
    return {SYMMETRIC_SIZE: symmetric_size(heap, environ)} if heap else {}


def launch_arguments(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """CONFIG_FILE and then the command line. A `--job.config_file` on the command line comes later and overrides it."""
    file = environ.get("CONFIG_FILE")
    return ["--job.config_file", file, *argv] if file else [*argv]


def _format_ranks(request: LaunchRequest) -> str:
    here = f"{request.ranks} rank{'s' * (request.ranks != 1)}"
    if request.nodes == 1:
        return here
    return f"{here} on each of {request.nodes} machines (this is number {request.node})"


def supervise(request: LaunchRequest, argv: Sequence[str], environ: Mapping[str, str], stop_timeout: float) -> int:
    """Run the ranks of this machine until they end. Returns the exit code of the run.

    `stop_timeout`: seconds that the ranks have to save and exit after a stop signal.
    """
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="quadriga-") as folder:
        child_environ = {
            **environ,
            "PYTHONPATH": python_path(environ),
            LAUNCHER_PID: str(os.getpid()),
            RECORDS: folder,
        }
        command = [sys.executable, "-m", "quadriga.launch.agent", *torchrun_arguments(request), *argv]
        with handle_launcher_signals(stop_timeout) as signals:
            # In a new session, the terminal's Ctrl-C reaches only the launcher, which forwards it once. The save signal
            # is blocked until the agent has its handler. Otherwise a save request would kill an agent that starts.
            signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE_SIGNAL})
            child = subprocess.Popen(command, env=child_environ, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_SIGNAL})
            signals.attach(child)
            code = child.wait()
        reap_orphans()
        return report_exit(Path(folder), request.ranks, code, signals.stop_signals)


def torchrun_arguments(request: LaunchRequest) -> list[str]:
    """The arguments of torchrun: rendezvous, number of ranks, and the module that they run."""
    rendezvous = ["--nnodes", str(request.nodes), "--rdzv-id", "quadriga"]
    if request.nodes == 1:
        rendezvous += ["--rdzv-backend", LOOPBACK_RENDEZVOUS]
    else:
        rendezvous += ["--rdzv-backend", "static", "--rdzv-endpoint", str(request.endpoint)]
        rendezvous += ["--node-rank", str(request.node)]
    ranks = ["--nproc-per-node", str(request.ranks), "--max-restarts", str(request.restarts)]
    return [*rendezvous, *ranks, "--signals-to-handle", TORCHRUN_SIGNAL, "-m", "quadriga.train"]


def python_path(environ: Mapping[str, str]) -> str:
    source_root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [source_root, environ.get("PYTHONPATH")]))


class SignalHandler:
    """Forwards signals of the launcher to the agent. `stop_signals` are those received that request the end of the run.

    A second Ctrl-C kills the agent, and the ranks with it. So does the end of `stop_timeout` seconds after the first
    stop request.
    """

    def __init__(self, stop_timeout: float) -> None:
        self.stop_signals: list[int] = []
        self._stop_timeout = stop_timeout
        self._pending: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        while self._pending:
            child.send_signal(self._pending.pop(0))

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            self._kill("the ranks did not finish within %g s (checkpoint.timeout_seconds): killed", self._stop_timeout)
            return
        if number != SAVE_SIGNAL:
            self.stop_signals.append(number)
            if len(self.stop_signals) == 1:
                signal.setitimer(signal.ITIMER_REAL, self._stop_timeout)
        if self.stop_signals.count(signal.SIGINT) > 1:
            self._kill("interrupted twice: killed")
        elif self._child is None:
            self._pending.append(number)
        else:
            self._child.send_signal(number)

    def _kill(self, why: str, *facts: object) -> None:
        if self._child is not None:
            logger.error(f"{why}; checkpoints that were complete before stay intact", *facts)
            self._child.kill()


@contextmanager
def handle_launcher_signals(stop_timeout: float) -> Iterator[SignalHandler]:
    """Handle signals as stop and save requests instead of ending the launcher."""
    signals = SignalHandler(stop_timeout)
    with signal_handlers(signals.receive, (*STOP_SIGNALS, SAVE_SIGNAL, signal.SIGALRM)):
        try:
            yield signals
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def reap_orphans() -> None:
    """Wait for the processes that the agent left, so that neither a process nor a zombie of the run remains."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            return
