"""Kills a run at an exact point. Python imports this module in every process with this folder in PYTHONPATH.

QUADRIGA_FAULT = {"moment", "rank", "at", "victim", "marker"}: rank `rank` kills `victim` (one of VICTIMS) with SIGKILL
when it reaches the point `at` of `moment`:

| moment | at |
|---|---|
| step | [step, phase] of `Progress.enter_phase` |
| save | bytes of checkpoint files that this rank has written since its start; the write is truncated there |
| manifest | [number of the manifest since the start, bytes of it that are written] |
| rename | [number of the rename since the start, "before" or "after"] |
| remove | number of the removal (of an outdated checkpoint, or of partial files) since the start |
| verify | bytes of checkpoint files that this rank has hashed before it loads |
| load | "before" or "after" this rank reads its tensors |

`marker` is a file that records that the fault has happened, so that it happens once. Quadriga has no code for this.

QUADRIGA_DEFECT names one of DEFECTS, which is injected into every rank. It tests that the kill matrix can fail.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time

FAULT = json.loads(os.environ.get("QUADRIGA_FAULT", "null"))
VICTIMS = ("this rank", "all ranks", "torchrun", "launcher")


def kill_victim():
    """Kill the victim, once."""
    try:
        os.close(os.open(FAULT["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    agent = os.getppid()
    if FAULT["victim"] == "torchrun":
        os.kill(agent, signal.SIGKILL)
    elif FAULT["victim"] == "launcher":
        os.kill(int(os.environ["QUADRIGA_LAUNCHER_PID"]), signal.SIGKILL)
    else:
        for rank in peers(agent) if FAULT["victim"] == "all ranks" else ():
            os.kill(rank, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # this process is killed with its parent


def peers(agent):
    """The other children of the agent."""
    with open(f"/proc/{agent}/task/{agent}/children") as file:
        return [int(pid) for pid in file.read().split() if int(pid) != os.getpid()]


def call_before(owner, name, when):
    """Call `when(...)` with the arguments before each call of `owner.name`. It may kill."""
    original = getattr(owner, name)

    def wrapped(*args, **keys):
        when(*args, **keys)
        return original(*args, **keys)

    setattr(owner, name, wrapped)


class Counter:
    def __init__(self):
        self.n = 0

    def add(self, by=1):
        self.n += by
        return self.n


def patch_step(progress):
    wanted = FAULT["at"]

    def when(self, phase, step=None):
        if [self.step if step is None else step, phase] == wanted:
            kill_victim()

    call_before(progress.Progress, "enter_phase", when)


def patch_save(tensors):
    written = Counter()
    original = tensors._HashedStream.write

    def write(self, data):
        data = memoryview(data).cast("B")
        remaining = FAULT["at"] - written.n
        if 0 <= remaining < len(data):
            original(self, data[:remaining])
            self.flush()
            kill_victim()
            data = data[remaining:]
        written.add(len(data))
        return original(self, data)

    tensors._HashedStream.write = write


def patch_manifest(files):
    written = Counter()
    number, length = FAULT["at"]

    def when(self, path, data):
        if str(path).endswith("train_state.json") and written.add() == number:
            with open(path, "wb") as file:
                file.write(data[:length])
            kill_victim()

    call_before(files.LocalFiles, "write", when)


def patch_rename(files):
    renamed = Counter()
    number, side = FAULT["at"]
    original = files.LocalFiles.rename

    def rename(self, path, new):
        hit = not str(path).endswith(".metadata.tmp") and renamed.add() == number
        if hit and side == "before":
            kill_victim()
        original(self, path, new)
        if hit and side == "after":
            kill_victim()

    files.LocalFiles.rename = rename


def patch_remove(files):
    removed = Counter()
    call_before(
        files.LocalFiles,
        "remove",
        lambda self, path: None if str(path).endswith(".try") or removed.add() != FAULT["at"] else kill_victim(),
    )


def patch_verify(folder):
    import hashlib

    read = Counter()

    def sha256(files, path):
        digest = hashlib.sha256()
        with files.open(path, "rb") as file:
            while chunk := file.read(1 << 12):
                if read.add(len(chunk)) >= FAULT["at"]:
                    kill_victim()
                digest.update(chunk)
        return digest.hexdigest()

    folder.sha256 = sha256


def patch_load(tensors):
    original = tensors.load_tensors

    def read(*args, **keys):
        if FAULT["at"] == "before":
            kill_victim()
        result = original(*args, **keys)
        if FAULT["at"] == "after":
            kill_victim()
        return result

    tensors.load_tensors = read


PATCHES = {
    "step": ("quadriga.resilience.progress", patch_step),
    "save": ("quadriga.checkpoint.tensors", patch_save),
    "manifest": ("quadriga.checkpoint.files", patch_manifest),
    "rename": ("quadriga.checkpoint.files", patch_rename),
    "remove": ("quadriga.checkpoint.files", patch_remove),
    "verify": ("quadriga.checkpoint.folder", patch_verify),
    "load": ("quadriga.checkpoint.load", patch_load),
}


def drop_moments(tensors):
    original = tensors.load_tensors

    def read(place, wanted, group, **keys):
        kept = {name: value for name, value in wanted.items() if not name.startswith("optimizer.")}
        return original(place, kept, group, **{**keys, "may_hold_more": True})

    tensors.load_tensors = read


def drop_data_position(loader):
    loader.Loader.load_state_dict = lambda self, state: None


DEFECTS = {
    "moments": ("quadriga.checkpoint.load", drop_moments),
    "data": ("quadriga.data.loader", drop_data_position),
}


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Imports one module unchanged, and then patches it."""

    def __init__(self, module, patch):
        self.module, self.patch = module, patch

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.patch(module)

        spec.loader.exec_module = exec_module
        return spec


if FAULT and os.environ.get("RANK") == str(FAULT["rank"]):
    sys.meta_path.insert(0, PatchingFinder(*PATCHES[FAULT["moment"]]))
if defect := os.environ.get("QUADRIGA_DEFECT"):
    sys.meta_path.insert(0, PatchingFinder(*DEFECTS[defect]))
