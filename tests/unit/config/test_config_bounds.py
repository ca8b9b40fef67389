"""Whatever a file, a variable or an argument holds: one report, in bounded time. And `~` and `$NAME` in paths.

Inputs that once failed are kept here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quadriga.cli.main import main as command
from quadriga.config.keys import KEYS
from quadriga.config.sources import PATHS
from quadriga.errors import MAX_PROBLEMS, Problem, UserError, nearest
from quadriga.hardware import device_named
from quadriga.launch.environment import read_launch_request
from quadriga.launch.supervisor import main
from quadriga.train.__main__ import invalid_variables

DIGITS = "9" * 5000
FILES = {
    "a number of 5,000 digits": ("[training]\nsteps = " + DIGITS, "run.toml, line 2", "too many digits"),
    "a hexadecimal one": ("[training]\nsteps = 0x" + "f" * 5000, "run.toml", "`training.steps` holds a whole number"),
    "65 bits": ("[training]\nsteps = 18446744073709551616", "run.toml", "more than 64 bits"),
    "deep lists": ("a = " + "[" * 200_000, "run.toml", "nests deeper"),
    "deep tables": ("[" + "a." * 50_000 + "a]", "run.toml", "nests deeper"),
    "deep keys": ("a . " * 200_000 + "a = 1", "run.toml", "nests deeper"),
    "a null": ("\0", "run.toml, line 1", "this is not TOML"),
    "a null in a text": ('[job]\ndump_folder = "a\\u0000b"', "job.dump_folder", "null character"),
    "a long text": ('[job]\ndescription = "' + "x" * 100_000 + '"', "job.description", "longer than 65536"),
    "a long path": ('[job]\ndump_folder = "' + "x" * 5000 + '"', "job.dump_folder", "longer than 4096"),
    "a long key": ("x" * 1_000_000 + " = 1", "xxx", "outside every table"),
    "many unknown keys": ("[training]\n" + "".join(f"k{n} = 1\n" for n in range(50_000)), "training.k0", "no such key"),
    "a file without an end": ('extends = "/dev/zero"', "/dev/zero", "a device, not a regular file"),
    "a pipe": ('extends = "pipe"', "pipe", "a FIFO, not a regular file"),
    "a folder": ('extends = "."', "extends", "a folder, not a TOML file"),
    "a name that is too long": ('extends = "' + "x" * 5000 + '"', "extends", "File name too long"),
    "a null in a name": ('extends = "a\\u0000"', "extends", "null character"),
    "itself": ('extends = "run.toml"', "extends", "in a circle"),
    "a variable that is not set": ('extends = "$NOWHERE/a.toml"', "extends", "NOWHERE is not set"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_with_its_place(name, write, refusal):
    os.mkfifo("pipe")
    text, where, says = FILES[name]
    problems = refusal(write(text))
    assert where in problems[0].where
    assert says in problems[0].what
    report = UserError(*problems).report
    assert len(report) < 20_000
    assert all(char.isprintable() or char == "\n" for char in report)


def test_a_file_of_300_mb_in_one_line_is_not_read(refusal):
    with Path("run.toml").open("wb") as file:
        file.truncate(300_000_000)
    assert "longer than a configuration file may be" in refusal(Path("run.toml"))[0].what


def test_a_long_chain_of_files_is_refused(write, refusal, read_config):
    for number in range(60):
        write(f'extends = "c{number + 1}.toml"', f"c{number}.toml")
    assert refusal(Path("c0.toml"))[0].what == "the chain of files is too long"
    write("[training]\nsteps = 7", "c60.toml")
    assert read_config(Path("c45.toml")).config.training.steps == 7


def test_utf16_and_other_bytes(refusal):
    for content in ("[job]\n".encode("utf-16"), b'[job]\ndescription = "\xff"', b"\xff\xfe"):
        Path("run.toml").write_bytes(content)
        assert "is not UTF-8" in refusal(Path("run.toml"))[0].what


@pytest.mark.parametrize("key", [key for key in KEYS if int in KEYS[key].plain_types])
def test_every_number_has_an_upper_bound(key, refusal):
    assert refusal(f"--{key}={10**19}")[0].what == "out of range"
    assert refusal(f"--{key}={10**400}")[0].what == "out of range"
    assert refusal(f"--{key}={DIGITS}")[0].what == "wrong type: text"


HUGE = [
    ("--training.local_batch_size=1000000000", "--training.seq_len=1000000000", "--training.steps=1000000000"),
    ("--training.global_batch_size=1000000000", "--training.local_batch_size=1"),
    ("--training.loss_chunks=1000000000",),
    ("--optimizer.lr=1e308", "--model.rope_theta=1e308", "--health.spike_sigmas=1e308"),
    ("--model.dim=16777216", "--model.ffn_dim=16777216", "--model.n_heads=1048576", "--model.n_kv_heads=1048576"),
]


@pytest.mark.parametrize("keys", HUGE, ids=lambda keys: keys[0])
def test_what_is_allowed_can_be_estimated(keys, capsys):
    assert main([*keys, "--estimate.device=H100"], {"DRY_RUN": "1", "NGPU": "1"}) == 0
    assert "Ready to train." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (1, ("--model.n_layers=1024",)),
        (131072, ()),
        (64, ("--parallelism.pipeline_parallel_degree=64", "--model.n_layers=64", "--training.local_batch_size=256")),
    ],
)
def test_the_largest_that_is_allowed_takes_seconds(ranks, keys, capsys):
    assert main([*keys, "--estimate.device=H100"], {"DRY_RUN": "1", "NGPU": str(ranks)}) == 0


def test_a_pipeline_of_very_many_passes_is_refused_and_the_way_out_works(refusal, read_config):
    keys = ["--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=131072"]
    (problem,) = refusal(*keys, ranks=4)
    assert "more passes than a schedule" in problem.what
    size = problem.fix.split()[3]
    near = 1 << (int(size) - 1).bit_length()
    assert read_config(*keys, f"--parallelism.pipeline_parallel_microbatch_size={near}", ranks=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("NGPU", value) for value in (DIGITS, "1000000000", "-1", "1e3", "\N{ARABIC-INDIC DIGIT FIVE}", "\udcff")),
        *(("NNODES", value) for value in (DIGITS, "0", "x")),
        *(("NODE_RANK", value) for value in (DIGITS, "-1")),
        *(("MAX_RESTARTS", value) for value in (DIGITS, "\x1b[2J")),
        *(("LOG_RANK", value) for value in (DIGITS, "0,x", "0;1", "-1")),
    ],
)
def test_a_variable_is_refused_by_name(name, value):
    _, problems = read_launch_request({"NGPU": "2", name: value})
    assert [problem.where for problem in problems] == [name]
    assert all(char.isprintable() or char == "\n" for char in str(problems[0]))


@pytest.mark.parametrize("endpoint", ["a:0", "a:65536", "a:" + DIGITS, "a", ":29500", "a b:1", "a:1:", "\x1b:1", "a:١"])
def test_an_endpoint_is_a_host_and_a_port(endpoint):
    _, problems = read_launch_request({"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": endpoint})
    assert [problem.where for problem in problems] == ["RDZV_ENDPOINT"]
    for right in ("node0:29500", "10.0.0.1:1", "[fe80::1%eth0]:65535"):
        assert read_launch_request({"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": right})[1] == []


def test_too_many_ranks_in_all():
    assert [p.where for p in read_launch_request({"NGPU": "131072", "NNODES": "131072", "DRY_RUN": "1"})[1]] == [
        "NGPU, NNODES"
    ]


def test_what_torchrun_sets_is_looked_at():
    assert invalid_variables({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}) == []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        assert [problem.where for problem in invalid_variables({name: DIGITS})] == [name]
    assert invalid_variables({"RANK": "2", "WORLD_SIZE": "2"})[0].where == "RANK"
    assert invalid_variables({"MASTER_PORT": "65536"})[0].where == "MASTER_PORT"


@pytest.mark.parametrize(
    "text",
    [
        'name = "a"\nmemory = nan\nfp32 = 1',
        'name = "a"\nmemory = 1e300\nfp32 = 1',
        'name = "a"\nmemory = 1\nfp32 = 1e-300',
        'name = ["a"]\nmemory = 1\nfp32 = 1',
        'name = "\\u001b[2J"\nmemory = 1\nfp32 = 1',
        'name = "a"\nmemory = ' + DIGITS,
        "\0",
    ],
)
def test_a_device_file_is_refused(text):
    Path("device.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        device_named("device.toml", "estimate.device")
    assert "device.toml" in str(caught.value)


def test_a_report_is_bounded_and_printable():
    problem = Problem("\x1b[2J" + "x" * 10_000, "y" * 10_000, "\r\n" * 5000, allowed="z" * 10_000)
    report = UserError(*[problem] * 1000).report
    assert len(report) < MAX_PROBLEMS * 8000
    assert report.endswith(f"and {1000 - MAX_PROBLEMS} more")
    assert all(char.isprintable() or char == "\n" for char in report)
    assert nearest("x" * 1_000_000, ["a"]) is None


# --- paths


def test_every_key_of_a_path_is_expanded(read_config):
    environ = {"HOME": "/home/me", "DATA": "/data", "RUN": "run7"}
    known = {key for key in KEYS if key.endswith(("folder", "path", "_csv", "_file")) and key != "job.save_config_file"}
    assert known <= PATHS, "a key that names a file is in the list"
    run = read_config(
        *("--job.dump_folder=~/$RUN", "--checkpoint.folder=${RUN}_checkpoints", "--metrics.save_tb_folder=$RUN"),
        *("--checkpoint.initial_load_path=s3://bucket/${RUN}/a", "--checkpoint.enable"),
        *("--training.dataset=text", "--training.dataset_path=$DATA/text", "--model.hf_assets_path=~/hf"),
        environ=environ,
        training=False,
    )
    assert run.config.job.dump_folder == "/home/me/run7"
    assert run.spec.folders.checkpoint == "/home/me/run7/run7_checkpoints"
    assert run.spec.folders.tensorboard == "/home/me/run7/run7"
    assert run.config.checkpoint.initial_load_path == "s3://bucket/run7/a"
    assert run.config.training.dataset_path == "/data/text"
    assert run.config.model.hf_assets_path == "/home/me/hf"


def test_files_are_found_through_variables(write, read_config, tmp_path):
    write("[training]\nsteps = 7", "there/base.toml")
    write('extends = "${PLACE}/base.toml"')
    environ = {"PLACE": str(tmp_path / "there"), "HOME": str(tmp_path)}
    assert read_config("--job.config_file=~/run.toml", environ=environ).config.training.steps == 7
    assert (
        read_config("--job.config_file=$HOME/run.toml", environ=environ).config.job.config_file
        == f"{tmp_path}/run.toml"
    )


@pytest.mark.parametrize("key", sorted(PATHS - {"estimate.device", "job.config_file"}))
def test_a_variable_that_is_not_set_is_refused_by_name(key, refusal):
    (problem,) = [each for each in refusal(f"--{key}=$DTAA/x", environ={"DATA": "/data"}) if each.where == key]
    assert problem.what == "the environment variable DTAA is not set"
    assert problem.nearest == "DATA"
    assert "is not a variable" in refusal(f"--{key}=${{a b}}/x")[0].what
    assert "no home folder" in refusal(f"--{key}=~nobody-of-this-name/x")[0].what


@pytest.mark.parametrize("value", [DIGITS, "0", "-1", "1e3", "\x1b[2J", "\N{ARABIC-INDIC DIGIT FIVE}"])
def test_a_number_of_ranks_on_a_command_line(value, write, capsys):
    assert command(["estimate", str(write("")), f"--ngpu={value}"]) == 2
    assert all(char.isprintable() or char == "\n" for char in capsys.readouterr().err)


def test_an_estimate_of_999999999_ranks_takes_moments(write, capsys):
    assert command(["estimate", str(write("")), "--ngpu=999999999", "--device=H100"]) == 0
