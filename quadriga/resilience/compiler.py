"""The compiler: the folder of its cache, and the report on a failed compilation."""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from quadriga.config import Run
from quadriga.config.keys import format_toml
from quadriga.errors import Problem, UserError, causes, shortened

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def set_compile_cache(environ: MutableMapping[str, str]) -> None:
    """Set `TORCHINDUCTOR_CACHE_DIR`, if it is not set, to a folder that only this user can read and write.

    Inductor runs the shared libraries that it finds there. torch's default is a folder in /tmp with a name that is
    known in advance, so another user of the machine can create it first. An import of torch sets the variable to this
    default, which therefore counts as not set.

    Raises:
        UserError: the folder cannot be created, belongs to another user, or is open to others.
    """
    if environ.get(CACHE, "") not in ("", default_cache_dir()):
        return
    folder, fix = Path("~/.cache/quadriga-compile"), f"set {CACHE} to a folder that only you can write"
    try:
        base = environ.get("XDG_CACHE_HOME", "")
        folder = Path(base if os.path.isabs(base) else Path.home() / ".cache", folder.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError) as error:
        raise UserError(Problem(CACHE, f"the cache of compiled code cannot be created: {error}", fix=fix)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(Problem(CACHE, "the cache of compiled code is no folder of this user", str(folder), fix=fix))
    if found.st_mode & 0o077:
        what = "other users have access to the cache of compiled code, which is loaded as it is"
        raise UserError(Problem(CACHE, what, str(folder), fix=f"remove it, or {fix}"))
    environ[CACHE] = str(folder)


def failed_compilation(error: BaseException) -> BaseException | None:
    """The error of torch.compile that `error` or one of its causes is; None if there is none."""
    return next((each for each in causes(error) if isinstance(each, TorchDynamoException)), None)


def compile_error(failure: BaseException, run: Run) -> UserError:
    """The report on an error that `failed_compilation` found."""
    why = " ".join(str(failure).split("\n\n")[0].split())
    what = f"the compilation of the model or the loss failed: {type(failure).__name__}: {shortened(why, 300)}"
    fix = (
        "set compile.enable = false, or compile.components to the part that compiles; "
        "the environment variable TORCH_LOGS=dynamo,inductor prints what the compiler did"
    )
    return UserError(
        Problem(
            "compile.enable", what, format_toml(run.config.compile.enable), run.origin.get("compile.enable"), fix=fix
        )
    )
