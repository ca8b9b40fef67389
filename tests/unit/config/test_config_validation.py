"""Keys of validation: its sets, what it reads of them, and what follows from training."""

from __future__ import annotations

import pytest

from quadriga.config.keys import to_toml
from quadriga.config.run_spec import ValidationSpec
from quadriga.config.schema import TextKeys, TokenKeys, Training, Validation, ValidationSet

ON = ("--validation.enable", "--validation.dataset=builtin_validation")
SETS = """
[validation]
enable = true

[[validation.sets]]
name = "web"
dataset = "builtin_validation"

[[validation.sets]]
{second}
"""
BUILTIN = 'dataset = "builtin"'


def test_length_batch_and_windows_follow(read_config) -> None:
    assert read_config("--training.seq_len=64").spec.validation is None
    sizes = ("--training.seq_len=64", "--training.local_batch_size=3")
    assert read_config(*ON, *sizes).spec.validation == ValidationSpec(64, 3, 64)
    own = ("--validation.seq_len=32", "--validation.local_batch_size=2", "--validation.windows=5")
    assert read_config(*ON, *sizes, *own).spec.validation == ValidationSpec(32, 2, 5)
    assert read_config(*ON, *sizes, "--validation.windows=-1").spec.validation == ValidationSpec(64, 3, None)


@pytest.mark.parametrize(("steps", "windows"), [(-1, None), (5, 5 * 3 * 4)])
def test_steps_mean_batches_of_every_data_parallel_rank(read_config, steps: int, windows: int | None) -> None:
    ranks = ("--parallelism.data_parallel_shard_degree=4", "--parallelism.tensor_parallel_degree=2")
    given = ("--training.seq_len=64", "--validation.local_batch_size=3", f"--validation.steps={steps}")
    assert read_config(*ON, *ranks, *given, ranks=8).spec.validation == ValidationSpec(64, 3, windows)


def test_both_lengths_are_refused_with_a_remedy_that_works(read_config, refusal) -> None:
    both = (*ON, "--validation.steps=5", "--validation.windows=10")
    (problem,) = refusal(*both)
    assert "validation.windows = 10 and validation.steps = 5" in problem.where
    assert "--validation.steps none" in problem.fix
    assert (
        read_config(*both[:-2], "--validation.windows=10", "--validation.steps", "none").spec.validation.windows == 10
    )


@pytest.mark.parametrize("argument", ["--validation.seq_len=33", "--validation.local_batch_size=3"])
def test_what_is_set_must_divide_as_in_training(refusal, read_config, argument: str) -> None:
    layout = ("--parallelism.tensor_parallel_degree=2", "--parallelism.pipeline_parallel_degree=2", *ON)
    layout += ("--training.local_batch_size=4", "--parallelism.pipeline_parallel_microbatch_size=2")
    (problem,) = refusal(*layout, argument, ranks=4)
    assert argument.partition("=")[0].removeprefix("--") in problem.where
    read_config(*layout, ranks=4)


def test_a_training_that_does_not_divide_is_refused_once(refusal) -> None:
    problems = refusal("--parallelism.tensor_parallel_degree=2", "--training.seq_len=33", *ON, ranks=2)
    assert [problem.where.partition(" ")[0] for problem in problems] == ["training.seq_len"]


def test_sets_have_names_and_the_keys_of_training() -> None:
    training = Training(dataset="tokens", token_format="raw", token_dtype="uint32", token_eos_id=2)
    named = ValidationSet(name="a", dataset="tokens", dataset_path="x/y.bin")
    unnamed = ValidationSet(dataset="jsonl", dataset_path="x/held out.jsonl.gz", dataset_split="test")
    assert named.token_keys(training) == TokenKeys("validation.sets[a]", "x/y.bin", "raw", "uint32", 2, None)
    assert (unnamed.title, unnamed.label) == ("held_out", "held_out")
    texts = Training(dataset_text_field="body", dataset_config="b", dataset_path="p", dataset_streaming=False)
    place = ("x/held out.jsonl.gz", "validation.sets[held_out]")
    assert unnamed.text_keys(texts) == TextKeys("jsonl", *place, "body", None, None, "test", False)
    single = Validation(dataset="jsonl", dataset_path="p", dataset_template="{a}", dataset_streaming=True)
    assert single.text_keys(texts) == TextKeys("jsonl", "p", "validation", "body", "{a}", "b", None, True)
    assert single.read_sets == (single,)
    assert single.label is None
    templated = Training(dataset_template="{title}")
    assert Validation(dataset="jsonl").text_keys(templated).template == "{title}"
    assert Validation(dataset="jsonl", dataset_text_field="text").text_keys(templated).template is None


def test_sets_are_read_and_written_as_toml(write, read_config) -> None:
    run = read_config(write(SETS.format(second=BUILTIN + '\nname = "code"')))
    assert [each.title for each in run.config.validation.sets] == ["web", "code"]
    assert read_config(write(to_toml(run.config))).config.validation == run.config.validation


@pytest.mark.parametrize(
    ("second", "arguments", "where", "what"),
    [
        (BUILTIN, ("--validation.dataset=builtin",), "validation.sets and validation.dataset", "both are set"),
        (BUILTIN + '\nname = "web"', (), "validation.sets", "2 sets have the name web"),
        ('dataset = "jsonl"', (), "validation.sets[jsonl].dataset, ", "no path is given"),
        ('dataset = "jsonl"\ndataset_path = "no/where"', (), "validation.sets[where].dataset_path", "nothing is there"),
        (BUILTIN + "\ntoken_eos_id = 3", (), "validation.sets[builtin].token_eos_id", "only token files have it"),
        (BUILTIN + '\nkind = "x"', (), "validation.sets", "kind"),
        ('name = "a/b"\n' + BUILTIN, (), "validation.sets", "form"),
    ],
)
def test_sets_that_cannot_be_read_are_refused(write, refusal, second, arguments, where, what) -> None:
    (problem,) = refusal(write(SETS.format(second=second)), *arguments)
    assert where in problem.where
    assert what in str(problem)


def test_token_files_of_sets_are_checked(write, refusal, tmp_path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(64))
    place = f'dataset = "tokens"\ndataset_path = "{tmp_path}/a.bin"\n'
    (problem,) = refusal(write(SETS.format(second=place + 'token_format = "raw"')))
    assert (problem.where, "uint16" in problem.fix) == ("validation.sets[a].token_format", True)
    (problem,) = refusal(write(SETS.format(second=place + 'token_dtype = "uint16"\ntoken_eos_id = 999999')))
    assert problem.where == "validation.sets[a].token_eos_id"
    file = write(SETS.format(second=place + 'token_dtype = "uint16"').replace('"builtin_validation"', '"builtin"'))
    assert refusal(file, "--training.dataset=nothing")


def test_a_set_of_training_text_is_noticed(write, read_config) -> None:
    notices = read_config(write(SETS.format(second=BUILTIN)), "--training.dataset=builtin").spec.notices
    (notice,) = [each for each in notices if "same data" in each]
    assert notice.startswith("validation.sets[builtin] reads the same data as training,")
    assert not any("same data" in each for each in read_config(*ON).spec.notices)
