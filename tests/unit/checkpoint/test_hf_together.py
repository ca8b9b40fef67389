"""What `on_all_ranks` raises has an end: no exception is among its own causes, so that a walk along them ends."""

from __future__ import annotations

import pytest
import torch
from hf_models import SPEC, random_model, write_hf

from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.hf import import_hf
from quadriga.checkpoint.hf_folder import HfFolder
from quadriga.checkpoint.ranks import on_all_ranks
from quadriga.errors import Problem, UserError
from quadriga.models.registry import tensor_names


def causes(error: BaseException) -> list[BaseException]:
    """The error and everything that led to it, by cause and by context; fails where one comes twice on a path."""
    path: list[BaseException] = []

    def walk(one: BaseException | None, above: tuple[int, ...]) -> None:
        if one is None:
            return
        assert id(one) not in above, f"{one!r} is among its own causes"
        path.append(one)
        walk(one.__cause__, (*above, id(one)))
        walk(one.__context__, (*above, id(one)))

    walk(error, ())
    return path


@pytest.mark.parametrize("error", [UserError(Problem("a", "b")), CheckpointError("c"), ValueError("d")], ids=repr)
def test_one_rank_alone(error):
    def work() -> None:
        raise error

    with pytest.raises((UserError, CheckpointError)) as caught:
        on_all_ranks(None, work)
    assert error in causes(caught.value)


def test_a_refusal_in_the_middle_of_writing(tmp_path):
    """DCP wraps what `import_hf` raises while it writes; the refusal itself comes out."""
    model = random_model(SPEC)
    with torch.no_grad():
        model.norm.weight[3] = 1e5
    folder = HfFolder(write_hf(model, tmp_path / "hf"))
    with pytest.raises(UserError, match="outside the range of float16") as caught:
        import_hf(folder, tmp_path / "out", tensor_names(SPEC), {}, torch.float16)
    causes(caught.value)
