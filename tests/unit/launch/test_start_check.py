"""The dry run and the start give one verdict: each case is asked of both, and the dry run writes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from training import DEBUG_FILE, TINY, one_rank

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.launch.supervisor import main
from quadriga.models.registry import catalogue

SAVING = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=4")


def started(argv: list[str]) -> tuple[int, str]:
    """What one rank makes of it: exit code and report, without training (the step is left out)."""
    from quadriga.errors import Fault, UserError
    from quadriga.resilience import processes
    from quadriga.train import loop

    loop.train = lambda trainer: None
    folder = [word for word in argv if word.startswith("--job.dump_folder=")][-1].partition("=")[2]
    try:
        with processes.lock_run_folder(folder):
            return one_rank(argv), ""
    except (UserError, Fault) as error:
        return error.exit_code, str(error)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with step-2 and step-4 of a run of 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *TINY, *SAVING]
    assert run_ranks(one_rank, 1, argv, backend=None, timeout=120) == [0]
    return folder


@dataclass(frozen=True)
class Case:
    """`prepare` changes a copy of the trained folder; the keys that are asked for; what both answer."""

    name: str
    code: int
    says: str
    keys: tuple[str, ...] = ()
    prepare: Callable[[Path], object] | None = None


def cut(file: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(next(folder.glob(file)), 10)


def flip(file: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = next(folder.glob(file))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damage


def both(change: Callable[[str], Callable[[Path], object]], file: str) -> Callable[[Path], object]:
    return lambda folder: [change(f"checkpoint/step-{step}/{file}")(folder) for step in (2, 4)]


def without_optimizer(folder: Path) -> None:
    """As a last save of the model alone leaves it."""
    from quadriga.checkpoint.manifest import format_manifest

    (folder / "checkpoint").rename(folder / "old")
    path = folder / "old/step-4/train_state.json"
    path.write_text(format_manifest({**json.loads(path.read_text()), "contents": ["model"]}))


def file_for_traces(folder: Path) -> None:
    shutil.rmtree(folder / "comm_traces", ignore_errors=True)
    (folder / "comm_traces").write_text("a file")


def moved(*more: Callable[[Path], object]) -> Callable[[Path], object]:
    """The checkpoints in `old`, then the other changes."""
    return lambda folder: [(folder / "checkpoint").rename(folder / "old"), *(change(folder) for change in more)]


def without(*files: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / file).unlink() for file in files]


def sealed(**values: object) -> Callable[[Path], object]:
    """A manifest of step 4 with other values of `extra`, and its own hash."""
    from quadriga.checkpoint.manifest import format_manifest

    def change(folder: Path) -> None:
        path = folder / "checkpoint/step-4/train_state.json"
        manifest = json.loads(path.read_text())
        path.write_text(format_manifest({**manifest, "extra": {**manifest["extra"], **values}}))

    return change


def data(*lines: str, link: str = "") -> Callable[[Path], object]:
    """A folder of data with one file, and perhaps a link to nothing."""

    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "data/a.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if link:
            (folder / "data" / link).symlink_to(folder / "gone")

    return write


def token_ids(*ids: int, dtype: str = "<u2", name: str = "ids.bin") -> Callable[[Path], object]:
    """A headerless file of these ids, 30 times."""
    return lambda folder: np.tile(np.array(ids, dtype), 30).tofile(folder / name)


def hugging_face(*more: Callable[[Path], object]) -> Callable[[Path], object]:
    """Weights of the run's model in the form of Hugging Face, then the other changes."""

    def write(folder: Path) -> None:
        from hf_models import random_model, write_hf

        argv = ["--job.config_file", DEBUG_FILE, *TINY]
        run = read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=False)
        write_hf(random_model(run.spec.model), folder / "hf")
        for change in more:
            change(folder)

    return write


def index_that_leaves(folder: Path) -> None:
    (folder / "hf/model.safetensors").rename(folder / "hf.safetensors")
    index = {"weight_map": {"model.norm.weight": "../hf.safetensors"}}
    (folder / "hf/model.safetensors.index.json").write_text(json.dumps(index))


LONG = '{"text": "' + 60 * "words " + '"}'
MORE = ("--training.steps=6",)
JSONL = ("--training.dataset=jsonl", "--training.dataset_path=RUN/data")
NEW = (*JSONL, "--checkpoint.folder=new")
TOKENS = ("--training.dataset=tokens", "--training.dataset_path=RUN/ids.bin", "--checkpoint.folder=new")
IDS = (*TOKENS, "--training.token_dtype=uint16")
VALIDATES = (
    *("--validation.enable", "--validation.dataset=jsonl", "--validation.dataset_path=RUN/data"),
    "--validation.dataloader.window_overlap=0",
)

HF = ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=RUN/hf", "--checkpoint.folder=new")
WEIGHTS = "--checkpoint.initial_load_path=RUN/old/step-4"
STEPLESS = '--checkpoint.exclude_from_loading=["train_state"]'
ALLOWED = "--checkpoint.allow_change"
SAVED = "--checkpoint.folder=checkpoint"
VALIDATES_TOKENS = (
    *("--validation.enable", "--validation.dataset=tokens", "--validation.dataset_path=RUN/ids.bin"),
    *("--validation.token_dtype=uint16", "--validation.dataloader.window_overlap=0"),
)
TWO_SETS = (
    "--validation.enable",
    '--validation.sets=[{name="a", dataset="jsonl", dataset_path="RUN/data"}, '
    '{name="b", dataset="tokens", dataset_path="RUN/ids.bin", token_dtype="uint16"}]',
)
FOREIGN = moved(without("old/step-4/train_state.json", "old/step-4/plan.json"))
SEED = (*MORE, "--checkpoint.create_seed_checkpoint", "--debug.seed=7")
CASES = [
    Case("goes on", 0, "step 4, from", MORE),
    Case("asked for a step", 0, "step 2, from", (*MORE, "--checkpoint.load_step=2")),
    Case("a finished run", 0, "this run is finished"),
    Case("a newest one that is cut", 0, "step 2, from", MORE, cut("checkpoint/step-4/*.distcp")),
    Case("a newest one with another bit", 0, "step 2, from", MORE, flip("checkpoint/step-4/*.distcp")),
    Case("a step that is not there", 2, "has no checkpoint of this step", (*MORE, "--checkpoint.load_step=3")),
    Case("all are cut", 3, "no published checkpoint is good", MORE, both(cut, "*.distcp")),
    Case("all have another bit", 3, "no published checkpoint is good", MORE, both(flip, "*.distcp")),
    Case("another batch", 2, "was 8 when the checkpoint was saved", (*MORE, "--training.global_batch_size=4")),
    Case("another batch, allowed", 0, "step 4", (*MORE, "--training.global_batch_size=4", "--checkpoint.allow_change")),
    Case("another seed", 2, "debug.seed", (*MORE, "--debug.seed=7")),
    Case("another order", 2, "shuffle", (*MORE, "--training.dataloader.no_shuffle")),
    Case("other windows", 2, "window_overlap", (*MORE, "--training.dataloader.window_overlap=0")),
    Case(
        "another order, allowed", 0, "step 4", (*MORE, "--training.dataloader.no_shuffle", "--checkpoint.allow_change")
    ),
    Case("another model", 2, "model.n_layers", (*MORE, "--model.n_layers=3")),
    Case("other sequences", 2, "training.seq_len", (*MORE, "--training.seq_len=16")),
    Case(
        "no weights to start from",
        2,
        "not a checkpoint: it does not exist",
        ("--checkpoint.initial_load_path=nowhere",),
        lambda folder: (folder / "checkpoint").rename(folder / "old"),
    ),
    Case(
        "a run folder for its checkpoints",
        2,
        "(neither train_state.json nor .metadata)",
        ("--checkpoint.initial_load_path=RUN/old",),
        lambda folder: [(folder / "old").mkdir(), (folder / "checkpoint").rename(folder / "old/checkpoint")],
    ),
    Case(
        "weights of the old folder",
        0,
        "step 0, from the weights of",
        ("--checkpoint.initial_load_path=RUN/old",),
        lambda folder: (folder / "checkpoint").rename(folder / "old"),
    ),
    Case(
        "weights that are cut",
        3,
        "is damaged",
        ("--checkpoint.initial_load_path=RUN/old/step-4",),
        lambda folder: [(folder / "checkpoint").rename(folder / "old"), flip("old/step-4/*.distcp")(folder)],
    ),
    Case("a file for a folder", 2, "job.dump_folder", ("--job.dump_folder=RUN/config.toml/here",)),
    Case("a file for the traces", 2, "comm.save_traces_folder", MORE, file_for_traces),
    Case(
        "a model alone, to go on from",
        2,
        "has model, but no optimizer",
        (
            "--checkpoint.initial_load_path=RUN/old/step-4",
            "--checkpoint.initial_load_model_only=false",
            "--checkpoint.exclude_from_loading=optimizer",
        ),
        without_optimizer,
    ),
    Case("a seed beside damaged checkpoints", 0, "step 0", SEED, both(cut, "*.distcp")),
    Case(
        "a seed without the weights that the run will load",
        0,
        "step 0",
        (*SEED, "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=nowhere"),
        lambda folder: (folder / "checkpoint").rename(folder / "old"),
    ),
    Case("a seed of a finished run", 0, "this run is finished", SEED[1:]),
    Case("a file for the checkpoints", 2, "checkpoint.folder", ("--checkpoint.folder=config.toml",)),
    Case(
        "no Hugging Face weights",
        2,
        "no such folder",
        ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=nowhere", "--checkpoint.folder=new"),
    ),
    Case(
        "data that is not there",
        2,
        "training.dataset_path",
        ("--training.dataset=text", "--training.dataset_path=nowhere"),
    ),
    Case("weights of another model", 2, "shapes differ", (WEIGHTS, "--model.dim=64"), moved()),
    Case("weights of more layers", 2, "the checkpoint lacks", (WEIGHTS, "--model.n_layers=3"), moved()),
    Case("weights of fewer layers", 2, "only the checkpoint has", (WEIGHTS, "--model.n_layers=1"), moved()),
    Case("other shapes, allowed", 2, "model.ffn_dim", (*MORE, "--model.ffn_dim=56", ALLOWED)),
    Case("weights of other frequencies", 2, "model.rope_theta", (WEIGHTS, "--model.rope_theta=123.0"), moved()),
    Case("other frequencies, allowed", 0, "step 0", (WEIGHTS, "--model.rope_theta=123.0", ALLOWED), moved()),
    Case("Hugging Face weights", 0, "step 0, from the Hugging Face weights in", HF, hugging_face()),
    Case("those of another width", 2, "intermediate_size", (*HF, "--model.ffn_dim=56"), hugging_face()),
    Case("those of fewer layers", 2, "num_hidden_layers", (*HF, "--model.n_layers=3"), hugging_face()),
    Case("the same, allowed", 2, "are missing", (*HF, "--model.n_layers=3", ALLOWED), hugging_face()),
    Case("those without a configuration", 2, "config.json", HF, hugging_face(without("hf/config.json"))),
    Case("those that are cut", 2, "damaged or incomplete", HF, hugging_face(cut("hf/model.safetensors"))),
    Case("an index that leaves", 2, "entries other than safetensors", HF, hugging_face(index_that_leaves)),
    Case("foreign weights", 0, "which were not saved by Quadriga", (WEIGHTS,), FOREIGN),
    Case("foreign weights of another model", 2, "shapes differ", (WEIGHTS, "--model.dim=64"), FOREIGN),
    Case(
        "foreign weights without a file",
        3,
        "is refused",
        (WEIGHTS,),
        lambda folder: [FOREIGN(folder), without("old/step-4/__0_0.distcp")(folder)],
    ),
    Case("good data", 0, "step 0", NEW, data(LONG)),
    Case("a link to no data", 2, "is a link that leads nowhere", NEW, data(LONG, link="b.jsonl")),
    Case("too few tokens", 2, "1 document with 4 tokens, fewer than the 33", NEW, data('{"text": "hi"}')),
    Case("a number for a text", 2, "a.jsonl", NEW, data('{"text": 3}', LONG)),
    Case("no text", 2, "training.dataset_text_field", NEW, data('{"body": "hi"}', LONG)),
    Case("too few tokens to validate on", 2, "lower validation.seq_len", (*MORE, *VALIDATES), data('{"text": "hi"}')),
    Case("other data", 2, "data of the checkpoint: dataset", (*MORE, *JSONL), data(LONG)),
    Case("other data, allowed", 0, "step 4", (*MORE, *JSONL, ALLOWED), data(LONG)),
    Case(
        "token files", 0, "1 file, 120 ids, 3 windows in an epoch, 10.7 epochs in this run", IDS, token_ids(1, 2, 3, 4)
    ),
    Case("token files without a type", 2, "training.token_dtype", TOKENS, token_ids(1, 2)),
    Case("too few ids", 2, "30 ids, fewer than the 33 of one window", IDS, token_ids(1)),
    Case("ids that the model lacks", 2, "token 2", IDS, token_ids(1, 2, 320)),
    Case("no token files", 2, "nothing is there", IDS),
    Case("token files for text", 2, "data of the checkpoint: dataset", (*MORE, *IDS, SAVED), token_ids(1, 2, 3)),
    Case("token files for text, allowed", 0, "step 4", (*MORE, *IDS, SAVED, ALLOWED), token_ids(1, 2, 3)),
    Case("tokens to validate on", 2, "validation.seq_len", (*MORE, *VALIDATES_TOKENS), token_ids(1)),
    Case(
        "sets to validate on",
        0,
        "every 10 steps the first 64 windows of 32 tokens of each set: at most 2,144 tokens,",
        (*MORE, *TWO_SETS),
        lambda folder: [data(LONG)(folder), token_ids(1, 2, 3)(folder)],
    ),
    Case("a folder for the lock", 2, "job.dump_folder", MORE, lambda folder: (folder / ".lock").mkdir()),
    Case("a link for the lock", 2, "job.dump_folder", MORE, lambda folder: (folder / ".lock").symlink_to("no/where")),
    Case("a state that is no state", 2, "world_size", MORE, sealed(world_size="x")),
    Case("data in no state", 2, "cannot be used", MORE, sealed(dataloader={"fingerprint": 7, "lanes": {}})),
    Case("without the step", 0, "step 0, with the rest of step 4, from", (*MORE, STEPLESS)),
    Case("a finished run without its step", 0, "step 0, with the rest of step 4, from", (STEPLESS,)),
    Case("a tokenizer that is not there", 2, "no tokenizer is there", ("--model.hf_assets_path=nowhere",)),
]


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def arguments(folder: Path, case: Case) -> list[str]:
    keys = [key.replace("RUN", str(folder)) for key in case.keys]
    return [f"--job.dump_folder={folder}", *TINY, *SAVING, *keys]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.lstat() for path in sorted(folder.rglob("*"))}
    return {path: (each.st_size, each.st_mtime_ns) for path, each in found.items()}


def dry_run(argv: list[str], capsys: pytest.CaptureFixture[str], ranks: str = "1") -> tuple[int, str]:
    code = main(argv, {"CONFIG_FILE": DEBUG_FILE, "NGPU": ranks, "DRY_RUN": "1"})
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_dry_run_says_what_a_start_says(case: Case, folder: Path, capsys) -> None:
    if case.prepare is not None:
        case.prepare(folder)
    before = state(folder)
    code, shown = dry_run(arguments(folder, case), capsys)
    assert state(folder) == before
    assert code == case.code, shown
    assert case.says in " ".join(shown.split())
    assert ("Ready to train." in shown) == (code == 0)
    (start,) = run_ranks(started, 1, ["--job.config_file", DEBUG_FILE, *arguments(folder, case)], backend=None)
    assert start[0] == code, start


def test_problems_of_all_sets_are_reported_together(folder: Path, capsys) -> None:
    data('{"text": 3}')(folder)
    token_ids(1, 320)(folder)
    argv = arguments(folder, Case("", 2, "", (*MORE, *TWO_SETS)))
    code, shown = dry_run(argv, capsys)
    (start,) = run_ranks(started, 1, ["--job.config_file", DEBUG_FILE, *argv], backend=None)
    assert (code, start[0]) == (2, 2)
    for report in (shown, start[1]):
        assert "data/a.jsonl" in report
        assert "ids.bin" in report


def test_a_path_without_space_for_files_below_it_is_refused(tmp_path: Path, capsys) -> None:
    deep = "/".join([str(tmp_path), *["d" * 200] * 18])
    code, shown = dry_run([f"--job.dump_folder={deep}", *TINY, *SAVING], capsys)
    assert code == 2
    assert "its path has more than 3584 bytes" in " ".join(shown.split())


def test_a_run_that_is_under_way_is_seen(folder: Path, capsys) -> None:
    with (folder / ".lock").open("w") as lock:
        lock.write("process 7 on here since then\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, shown = dry_run(arguments(folder, CASES[0]), capsys)
    assert code == 2
    assert "in use by process 7 on here" in shown


def test_the_way_back_to_the_saved_batch_is_accepted(folder: Path, capsys) -> None:
    """Saved with 8 rows a step; on 2 ranks of 8 rows each that is the local batch's to give way."""
    argv = [*arguments(folder, CASES[0]), "--training.global_batch_size=-1", "--training.local_batch_size=8"]
    code, shown = dry_run(argv, capsys, "2")
    assert code == 2
    assert "to do: set training.local_batch_size to 4" in shown
    assert dry_run([*argv, "--training.local_batch_size=4"], capsys, "2")[0] == 0
    code, shown = dry_run([*argv, "--training.global_batch_size=16"], capsys, "2")
    assert code == 2
    assert "to do: set training.global_batch_size to 8 and training.local_batch_size to 4;" in shown


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(folder: Path, capsys) -> None:
    from quadriga.checkpoint.manifest import format_manifest

    for step in (2, 4):
        path = folder / f"checkpoint/step-{step}/train_state.json"
        path.write_text(format_manifest({**json.loads(path.read_text()), "extra": {"model": 7}}))
    code, shown = dry_run(arguments(folder, CASES[0]), capsys)
    assert code == 2
    assert "the state of the run in it cannot be used" in shown


def unusable(folder: Path, name: str) -> str:
    """A tokenizer that a rank would refuse; what the message says of it."""
    from tokenizer_folders import byte_level, write_folder

    config = {"bos_token": "<s>", "eos_token": "</s>"}
    if name == "vocab.json alone":
        folder.mkdir()
        (folder / "vocab.json").write_text('{"a": 0}')
        return "without merges.txt"
    if name == "no token":
        write_folder(folder, byte_level(), tokenizer_config={**config, "added_tokens_decoder": {"x": {}}})
        return "the entry of x is not a token"
    if name == "neither BOS nor EOS":
        write_folder(folder, byte_level(["<x>"]))
        return "neither a BOS nor an EOS token"
    broken = byte_level()
    broken["pre_tokenizer"] = {"type": "Unheard"}
    write_folder(folder, broken, tokenizer_config=config)
    return "not a tokenizer of Hugging Face"


@pytest.mark.parametrize("name", ["vocab.json alone", "no token", "neither BOS nor EOS", "a part that is unknown"])
@pytest.mark.parametrize("environ", [{"DRY_RUN": "1"}, {}], ids=["dry run", "start"])
def test_a_tokenizer_that_cannot_be_used_is_refused_before_the_launch(
    name: str, environ: dict[str, str], tmp_path: Path, capsys
) -> None:
    says = unusable(tmp_path / "tok", name)
    argv = [f"--job.dump_folder={tmp_path / 'run'}", *TINY, f"--model.hf_assets_path={tmp_path / 'tok'}"]
    code = main(argv, {"CONFIG_FILE": DEBUG_FILE, "NGPU": "1", **environ})
    shown = capsys.readouterr()
    assert code == 2
    assert says in " ".join((shown.out + shown.err).split())
    assert not (tmp_path / "run").exists(), "no rank was started"
