"""The keys that say which texts are read: which data sets have them, and which values are refused."""

from __future__ import annotations

import json

import pytest

from quadriga.config.assets import DATASETS, OPTIONAL_KEYS
from quadriga.config.schema import TextKeys, Training, TrainingSource, Validation

SET = {
    "dataset_template": '"{title}"',
    "dataset_config": '"en"',
    "dataset_split": '"test"',
    "dataset_streaming": "false",
}


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"title": "t", "text": "x" * 9999}) + "\n")
    return file


def test_text_keys_are_the_keys_of_the_section():
    keys = {"dataset": "hub", "dataset_path": "a/b", "dataset_text_field": "c", "dataset_config": "d"}
    keys |= {"dataset_split": "e", "dataset_streaming": False}
    expected = TextKeys("hub", "a/b", "training", "c", None, "d", "e", False)
    assert Training(**keys).text_keys == expected
    assert TrainingSource(**keys, name="n", weight=1.0).text_keys == expected._replace(table="training.sources[n]")


def test_validation_reads_the_field_of_training_or_its_template():
    training = Training(dataset="jsonl", dataset_path="t", dataset_template="{a}{b}")
    validation = Validation(dataset="jsonl", dataset_path="v")
    assert validation.text_keys(training) == TextKeys("jsonl", "v", "validation", template="{a}{b}")
    own = validation.model_copy(update={"dataset_text_field": "a"})
    assert own.text_keys(training) == TextKeys("jsonl", "v", "validation", "a")


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("dataset", ["text", "jsonl", "builtin"])
def test_a_key_that_the_data_do_not_have_is_refused(write, refusal, lines, dataset, name):
    if name in DATASETS[dataset].keys:
        return
    path = "" if dataset == "builtin" else f'dataset_path = "{lines}"\n'
    (problem,) = refusal(write(f'[training]\ndataset = "{dataset}"\n{path}{name} = {SET[name]}\n'))
    assert problem.where.startswith(f"training.{name} = ")
    assert "only" in problem.what
    assert f"remove training.{name}" in str(problem.fix)
    source = f'[[training.sources]]\nname = "a"\ndataset = "{dataset}"\n{path}weight = 1\n{name} = {SET[name]}\n'
    (problem,) = refusal(write(source))
    assert problem.where == f"training.sources[a].{name}"
    assert f"remove {name}" in str(problem.fix)


def test_a_data_set_of_the_hub_needs_a_name(write, refusal):
    (problem,) = refusal(write('[training]\ndataset = "hub"\n'))
    assert "org/name" in str(problem.fix)


def test_every_optional_key_belongs_to_a_data_set():
    assert {name for kind in DATASETS.values() for name in kind.keys} <= set(OPTIONAL_KEYS)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ('dataset_template = "{title"', "belongs to no field"),
        ('dataset_template = "{title}"\ndataset_text_field = "title"', "both are set"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(write, refusal, lines, keys, what):
    single = f'[training]\ndataset = "jsonl"\ndataset_path = "{lines}"\n{keys}\n'
    (problem,) = refusal(write(single))
    assert what in problem.what
    source = f'[[training.sources]]\nname = "a"\ndataset = "jsonl"\ndataset_path = "{lines}"\nweight = 1\n{keys}\n'
    (problem,) = refusal(write(source))
    assert problem.where == "training.sources[a].dataset_template"
    assert what in problem.what


def test_reading_a_configuration_does_not_look_at_urls(write, read_config, refusal):
    run = read_config(write('[training]\ndataset = "jsonl"\ndataset_path = "s3://bucket/x/*.jsonl.gz"\n'))
    assert run.config.training.text_keys.path == "s3://bucket/x/*.jsonl.gz"
    (problem,) = refusal(write('[training]\ndataset = "tokens"\ndataset_path = "s3://bucket/x.bin"\n'))
    assert problem.fix == "copy it to this machine first: quadriga data fetch s3://bucket/x.bin DIR"
