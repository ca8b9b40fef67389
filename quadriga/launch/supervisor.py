"""The launcher: every check before the launch, then torchrun as a child, its signals, and whose error is shown last.

It exists since torchrun turns a rank's exit 2 into 1 with a traceback of its own, repeats a report once a rank, and
leaves ranks alive when it is killed. No torch here: a wrong configuration is answered in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quadriga.checkpoint.folder import CheckpointError, newest_extra
from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import VARIABLE as SYMMETRIC_SIZE
from quadriga.comm.heap import symmetric_size
from quadriga.comm.network import INTERFACE_VARIABLES, format_ports, loopback_variables
from quadriga.config import Run, read
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.launch.agent import LAUNCHER_PID, SAVE_SIGNAL, TORCHRUN_SIGNAL
from quadriga.launch.dry_run import StartCheck, describe
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
from quadriga.log import logger, start_logging
from quadriga.models.registry import catalogue
from quadriga.planning.heap import heap_of
from quadriga.resilience.processes import RECORDS, adopt_orphans

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ORPHAN_SECONDS = 5.0  # that what the ranks started has to end when they have ended

REHEARSE = "--rehearse"
USAGE = """usage: [NGPU=4] [CONFIG_FILE=FILE] ./run_train.sh [--section.key value ...]
       python -m quadriga.launch --job.config_file FILE [--section.key value ...]

Trains on the ranks of this machine from one TOML file. Every key can be given behind it, as --section.key value,
--section.key=value, or --section.no_key for a switch; the command line wins over the environment, that over the file.

NGPU (4) ranks of this machine; CONFIG_FILE the TOML file; COMM_BACKEND gloo, nccl, nccl-symm or nvshmem; LOG_RANK (0)
the ranks that print progress; MAX_RESTARTS (0) how often the ranks are started again when one fails, to go on from the
newest checkpoint; DRY_RUN=1 says what the run would be and from which step it would go on, starts nothing, and leaves
with the exit code of such a start; with --rehearse it builds the run and takes a step with tensors that hold nothing;
for several machines NNODES, NODE_RANK and RDZV_ENDPOINT (host:port of machine 0); PYTHON the interpreter.

On one machine every port is opened on the loopback: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and
NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME name that interface unless you set them. Several machines need a closed network.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP: the step is finished and saved, and the run leaves with 75; a second
Ctrl-C ends it at once. SIGUSR2 saves and goes on. The files STOP and SAVE in the run folder do the same.

Exit codes:
  0    done
  1    a fault of the machine or the code
  2    something that you can mend, told in one report
  3    checkpoints are there, and every one is damaged
  4    a rank stopped, or a collective waited for too long
  5    the loss or the gradients are no numbers, or jumped, and [health] says to stop
  6    out of memory
  75   asked to leave: saved and left; the same start goes on from there, so that a scheduler may queue it again
  128 + n   ended by signal n, with nothing saved
docs/operations.md tells what to do about each.
"""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Launch what `argv` and `environ` ask for. Returns the documented exit code; 128 + n when signal n ended it."""
    if {"-h", "--help"} & set(argv):
        from quadriga.config.help import print_keys  # rich need not be loaded to start a run

        print(USAGE)
        print_keys()
        return EXIT_OK
    try:
        argv, rehearsal = split_rehearse_flag(argv)
        request, run = check_before_launch(argv, environ)
        if request.dry_run or run.config.only_rehearses:
            ready, ports = check_start(request, run, argv, environ), format_ports(environ, request.nodes)
            print(printable(describe(run, ready, ports), keep="\n"), flush=True)
            wanted = rehearsal or run.config.only_rehearses
            return run_rehearsal(run, launch_arguments(argv, environ), environ) if wanted else ready.code
        if rehearsal:
            raise UserError(Problem(REHEARSE, "a rehearsal is part of a dry run", fix="set DRY_RUN=1"))
        start_logging({**environ, "RANK": "0", "LOG_RANK": "0"})
        if request.node == 0:  # whose first rank looks for checkpoints; other machines may not see them
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
    rank_variables = rank_environment(environ, request) | heap
    logger.info("%s over %s (%s)", _format_ranks(request), backend, reason)
    if request.nodes > 1 or len(loopback_variables(environ)) < len(INTERFACE_VARIABLES):
        logger.info("ports: %s", format_ports(environ, request.nodes))
    for name, size in heap.items():
        logger.info("%s=%s%s", name, size, "" if environ.get(name) else ": what this run needs")
    # The choice made here is the one that every rank keeps, or fails by: none may choose anew.
    environ = {**environ, **rank_variables, "COMM_BACKEND": backend}
    return supervise(request, launch_arguments(argv, environ), environ, run.config.checkpoint.timeout_seconds)


def split_rehearse_flag(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The command line without `--rehearse`, and whether it was there."""
    return [word for word in argv if word != REHEARSE], REHEARSE in argv


def run_rehearsal(run: Run, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Build a rank of the run and take one step, with tensors that hold nothing, in a child process; its exit code.

    Rank 0 and, where a pipeline makes ranks differ, the last one.
    """
    ranks = (0,) if run.spec.degrees.pp == 1 else (0, run.spec.world_size - 1)
    shared = {**environ, "PYTHONPATH": _python_path(environ), "WORLD_SIZE": str(run.spec.world_size)}
    print("\nRehearsal (tensors hold nothing, nothing is sent):", flush=True)
    for rank in ranks:
        command = [sys.executable, "-m", "quadriga.rehearsal.rehearse", *argv]
        code = subprocess.run(command, env={**shared, "RANK": str(rank)}, check=False).returncode
        if code != EXIT_OK:
            return code
    return EXIT_OK


def check_before_launch(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[LaunchRequest, Run]:
    """The request and the run, or a UserError with everything that is wrong in the variables and the configuration."""
    request, problems = read_launch_request(environ)
    try:
        run = resolve_run(request, argv, environ, training=not request.dry_run)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return request, run


def resolve_run(request: LaunchRequest, argv: Sequence[str], environ: Mapping[str, str], training: bool) -> Run:
    """The run on all ranks of all machines. `training` asks for what a rehearsal can do without."""
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
    """What a start would refuse this run for, or where it would begin; nothing of that where it only rehearses."""
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
    """What a dry run lets pass and training would refuse: assets that are not there, features that are not built."""
    try:
        heap_variables(resolve_run(request, argv, environ, training=True), environ)
    except UserError as error:
        return error.problems
    return ()


def heap_variables(run: Run, environ: Mapping[str, str]) -> dict[str, str]:
    """The size of NVSHMEM's heap for the ranks, where the run has one; or a UserError where the user's is too small."""
    heap = heap_of(run) if run.spec.backend == "nvshmem" else None
    return {SYMMETRIC_SIZE: symmetric_size(heap, environ)} if heap else {}


def launch_arguments(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line behind CONFIG_FILE; a `--job.config_file` of its own comes later and wins."""
    file = environ.get("CONFIG_FILE")
    return ["--job.config_file", file, *argv] if file else [*argv]


def _format_ranks(request: LaunchRequest) -> str:
    here = f"{request.ranks} rank{'s' * (request.ranks != 1)}"
    if request.nodes == 1:
        return here
    return f"{here} on each of {request.nodes} machines (this is number {request.node})"


def supervise(request: LaunchRequest, argv: Sequence[str], environ: Mapping[str, str], stop_timeout: float) -> int:
    """Run the ranks of this machine to their end. Returns the exit code of the run.

    `stop_timeout`: the seconds that the ranks have to save and leave when a signal asks for it.
    """
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="quadriga-") as folder:
        child_environ = {
            **environ,
            "PYTHONPATH": _python_path(environ),
            LAUNCHER_PID: str(os.getpid()),
            RECORDS: folder,
        }
        command = [sys.executable, "-m", "quadriga.launch.agent", *torchrun_arguments(request), *argv]
        with handle_launcher_signals(stop_timeout) as signals:
            # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once. An agent
            # that has only begun to start is not to die of a save request: it takes it up when it is ready.
            signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE_SIGNAL})
            child = subprocess.Popen(command, env=child_environ, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_SIGNAL})
            signals.attach(child)
            code = child.wait()
        reap_orphans()
        return report_exit(Path(folder), request.ranks, code, signals.stop_signals)


def torchrun_arguments(request: LaunchRequest) -> list[str]:
    """Where the ranks meet, and what they run."""
    rendezvous = ["--nnodes", str(request.nodes), "--rdzv-id", "quadriga"]
    if request.nodes == 1:
        rendezvous += ["--rdzv-backend", LOOPBACK_RENDEZVOUS]
    else:
        rendezvous += ["--rdzv-backend", "static", "--rdzv-endpoint", str(request.endpoint)]
        rendezvous += ["--node-rank", str(request.node)]
    ranks = ["--nproc-per-node", str(request.ranks), "--max-restarts", str(request.restarts)]
    return [*rendezvous, *ranks, "--signals-to-handle", TORCHRUN_SIGNAL, "-m", "quadriga.train"]


def _python_path(environ: Mapping[str, str]) -> str:
    source_root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [source_root, environ.get("PYTHONPATH")]))


class SignalHandler:
    """What the launcher was told, passed on to the agent; `stop_signals` are those that ask for the end of the run.

    A second Ctrl-C ends all at once, and so does the end of `stop_timeout` seconds after the first request to stop: the
    ranks die with the agent.
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
            self._kill("they were not done within %g s (checkpoint.timeout_seconds): killed", self._stop_timeout)
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
            logger.error(f"{why}; saves that were finished before are whole", *facts)
            self._child.kill()


@contextmanager
def handle_launcher_signals(stop_timeout: float) -> Iterator[SignalHandler]:
    """Take signals as stop and save requests, and no longer as our own end."""
    signals = SignalHandler(stop_timeout)
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    for number in map(int, (*STOP_SIGNALS, SAVE_SIGNAL, signal.SIGALRM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
            before[number] = signal.signal(number, signals.receive)
    try:
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def reap_orphans() -> None:
    """See the last of what the agent left behind, so that neither a process nor a zombie of the run remains."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            return
