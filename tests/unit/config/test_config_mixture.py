"""The tables of a mixture: read, refused with their place, and turned into shares and stages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import jsonschema
import pytest

from quadriga.config import to_toml
from quadriga.config.mixing import format_mixture, mixture_stages
from quadriga.config.reference import json_schema
from quadriga.config.schema import TrainingSource

PAIR = """
[[training.sources]]
name = "web"
dataset = "tokens"
dataset_path = "web.bin"
token_dtype = "uint16"
weight = 0.7

[[training.sources]]
dataset = "jsonl"
dataset_path = "books"
weight = 0.3
"""


@pytest.fixture(autouse=True)
def _files() -> None:
    Path("web.bin").write_bytes(bytes(4096))
    Path("books").mkdir()
    Path("books/a.jsonl").write_text('{"text": "a"}\n')


def test_the_tables_are_read_and_written_again(write, read_config):
    stage = "\n[[training.stages]]\nfrom_step = 5\nweights = { books = 1 }\n"
    run = read_config(write(PAIR + stage, "first.toml"), "--training.steps=9")
    web, books = run.config.training.sources
    assert (web.title, books.title, books.weight) == ("web", "books", 0.3)
    assert run.spec.tokenizer.kind == "bytes"
    again = read_config(write(to_toml(run.config)))
    assert again.config.training == run.config.training
    jsonschema.Draft202012Validator(json_schema()).validate(tomllib.loads(to_toml(run.config)))
    assert format_mixture(run.config.training) == "a mixture of web 70 %, books 30 %, in 2 stages"


def test_a_list_on_the_command_line_replaces_that_of_the_file_and_of_its_base(write, read_config):
    write(PAIR, "base.toml")
    assert len(read_config(write('extends = "base.toml"')).config.training.sources) == 2
    one = '[[training.sources]]\nname = "one"\ndataset = "builtin"\nweight = 1\n'
    file = write(f'extends = "base.toml"\n{one}')
    assert [source.name for source in read_config(file).config.training.sources] == ["one"]
    run = read_config(file, "--training.sources", '[{name = "two", dataset = "builtin", weight = 2}]')
    assert [source.name for source in run.config.training.sources] == ["two"]


def test_a_run_of_token_files_alone_has_no_tokenizer(write, read_config):
    text = PAIR.partition("\n[[training.sources]]\ndataset")[0] + "token_eos_id = 5\n"
    run = read_config(write(text))
    assert run.spec.tokenizer.kind == "none"
    assert run.config.training.end_of_document == 5


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("data/books", "books"),
        ("data/books/*.jsonl", "books"),
        ("data/my books.jsonl.gz", "my_books"),
        ("/", "jsonl"),
        (None, "jsonl"),
    ],
)
def test_a_name_by_default(path, title):
    assert TrainingSource(dataset="jsonl", dataset_path=path, weight=1.0).title == title


SOURCES = "[[training.sources]]\ndataset = 'builtin'\n"
REFUSED = {
    "both": (PAIR + "[training]\ndataset = 'c4'\n", "training.sources and training.dataset", "remove training.dataset"),
    "no amount": (SOURCES, "training.sources[builtin]", None),
    "two amounts": (SOURCES + "weight = 1\ntokens = 5", "training.sources[builtin]", "keep one of"),
    "weights and tokens": (f"{PAIR}{SOURCES}tokens = 5", "training.sources", "give all sources a weight"),
    "all weights are 0": (
        SOURCES + "weight = 0\n[[training.stages]]\nfrom_step = 2\nweights = {builtin = 1}",
        "training.sources",
        "above 0",
    ),
    "one name twice": (f"{SOURCES}weight = 1\n{SOURCES}weight = 1", "training.sources", "set the key name"),
    "epochs of text": (SOURCES + "epochs = 2", "training.sources[builtin].epochs", "training.sources[builtin].tokens"),
    "a key of token files": (PAIR + "token_eos_id = 3", "training.sources[books].token_eos_id", "remove token_eos_id"),
    "an id that the model lacks": (
        PAIR.replace("weight = 0.7", "weight = 0.7\ntoken_eos_id = 5000"),
        "training.sources[web].token_eos_id",
        "the id that ends a document",
    ),
    "raw ids without a type": (
        PAIR.replace('token_dtype = "uint16"', 'token_format = "raw"'),
        "training.sources[web].token_format",
        "uint16",
    ),
    "no such data set": (PAIR.replace("jsonl", "jsnl"), "training.sources[books].dataset", None),
    "a stage of nothing": ("[[training.stages]]\nfrom_step = 1\nweights = {a = 1}", "training.stages", "sources"),
    "a stage without a start": (PAIR + "[[training.stages]]\nweights = {web = 1}", "training.stages[1]", None),
    "a stage of an unknown source": (
        PAIR + "[[training.stages]]\nfrom_step = 2\nweights = {boks = 1, web = 1}",
        "training.stages[1].weights",
        None,
    ),
    "a stage that reads nothing": (
        PAIR + "[[training.stages]]\nfrom_step = 2\nweights = {web = 0}",
        "training.stages[1].weights",
        "give a weight",
    ),
    "stages at one step": (
        PAIR + 2 * "[[training.stages]]\nfrom_tokens = 1\nweights = {web = 1}\n",
        "training.stages[2]",
        "in their order",
    ),
    "a source that is never read": (
        PAIR.replace("0.3", "0"),
        "training.sources[books].weight",
        "name it in a stage",
    ),
    "an unknown key": (PAIR + "wieght = 3", "training.sources[2].wieght", None),
    "no table": ("[training]\nsources = ['books']", "training.sources[1]", None),
    "one table": ("[training.sources]\ndataset = 'builtin'", "training.sources.dataset", "[[training.sources]]"),
    "a wrong type": (PAIR.replace("0.3", '"much"'), "training.sources[2].weight", None),
    "a name with a space": (PAIR.replace('"web"', '"the web"'), "training.sources[1].name", None),
    "an unknown variable": (PAIR.replace('"books"', '"$NO/books"'), "training.sources[2].dataset_path", "export NO"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_with_their_place(write, refusal, case):
    text, where, fix = REFUSED[case]
    (problem,) = refusal(write(text))
    assert problem.where == where
    assert fix is None or fix in problem.fix


def test_an_unknown_name_has_a_nearest_one(write, refusal):
    assert refusal(write(PAIR + "wieght = 3"))[0].nearest == "weight"
    assert refusal(write(REFUSED["a stage of an unknown source"][0]))[0].nearest == "books"


def test_missing_files_of_all_sources_are_reported_at_once(write, refusal):
    Path("web.bin").unlink()
    Path("books/a.jsonl").unlink()
    places = [problem.where for problem in refusal(write(PAIR))]
    assert places == ["training.sources[web].dataset_path", "training.sources[books].dataset_path"]


def test_a_key_of_a_table_on_the_command_line_names_the_list(refusal):
    (problem,) = refusal("--training.sources.weight=3")
    assert "this is a list of tables" in problem.what


def test_more_sources_than_a_record_can_count_are_refused(write, refusal):
    many = "".join(
        f"[[training.sources]]\nname = 's{number}'\ndataset = 'builtin'\nweight = 1\n" for number in range(1001)
    )
    (problem,) = refusal(write(many))
    assert problem.what == "there are 1,001 sources"


def test_skipping_needs_texts(write, refusal):
    text = PAIR.partition("\n[[training.sources]]\ndataset")[0]
    (problem,) = refusal(write(text), "--training.dataloader.on_bad_record=skip")
    assert problem.where.startswith("training.dataloader.on_bad_record = ")


def test_a_stage_after_the_last_step_is_a_notice(write, read_config):
    text = PAIR + "[[training.stages]]\nfrom_step = 200\nweights = {web = 1}"
    notices = read_config(write(text), "--training.steps=100").spec.notices
    assert "training.stages[1] begins at step 200, and the run ends at step 100" in notices


def test_weights_are_exact_and_stages_begin_at_whole_steps(write, read_config):
    text = PAIR.replace("0.7", "0.1").replace("0.3", "0.2")  # in binary, 0.1 + 0.2 is not 0.3
    text += "[[training.stages]]\nfrom_tokens = 8193\nweights = {web = 3, books = 1}"
    training = read_config(write(text)).config.training
    first, second = mixture_stages(training, 4096, {})
    assert first.parts == (333_333, 666_667)
    assert (second.first, second.parts) == (3, (750_000, 250_000))


def test_epochs_are_epochs_of_the_size(write, read_config):
    other = PAIR.replace("weight = 0.7", "epochs = 1.5").replace("weight = 0.3", "tokens = 1000")
    training = read_config(write(other)).config.training
    assert mixture_stages(training, 1, {"web": 2000})[0].parts == (750_000, 250_000)
