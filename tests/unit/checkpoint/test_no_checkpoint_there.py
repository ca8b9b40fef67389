"""What `initial_load_path` names and is no checkpoint is told for what it is."""

from quadriga.checkpoint import messages
from quadriga.checkpoint.manifest import InvalidCheckpoint


def test_a_place_that_is_no_checkpoint_is_reported_as_what_it_is(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint/step-3").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/model.safetensors").write_text("")
    for path, what, fix in (
        ("away", "it does not exist", "correct the path"),
        ("file", "neither train_state.json nor .metadata", "initial_load_in_hf"),
        ("hf", "neither train_state.json nor .metadata", "add --checkpoint.initial_load_in_hf"),
        ("run", "neither train_state.json nor .metadata", f"are in {run}/checkpoint"),
        ("run/checkpoint", "step-3/train_state.json cannot be read", None),
        ("run/checkpoint/step-3", "neither train_state.json nor .metadata", "use a folder that has one"),
    ):
        problem = messages.not_a_checkpoint(str(tmp_path / path), InvalidCheckpoint("train_state.json cannot be read"))
        assert what in problem.what, path
        assert (fix in problem.fix) if fix else problem.fix is None, path
