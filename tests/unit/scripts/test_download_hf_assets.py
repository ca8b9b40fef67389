"""scripts/download_hf_assets.py against a local server that speaks the Hub's paths."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer, Repository  # noqa: E402

SCRIPT = ROOT / "scripts" / "download_hf_assets.py"
LLAMA = "meta-llama/Llama-3.1-8B"
FILES = {
    "config.json": b'{"dim": 1}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"t" * 5000,
    "tokenizer_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 300_000,
    "model-00002-of-00002.safetensors": b"b" * 7,
    "model.safetensors.index.json": b"{}",
    "original/tokenizer.model": b"o" * 100,
    "README.md": b"read me",
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    repositories = {
        LLAMA: Repository(FILES),
        "org/gated": Repository(FILES, gated=True, members=frozenset({"hf_member"})),
        "org/flaky": Repository(FILES, breaks=2),
        "org/broken": Repository(FILES, breaks=1000),
        "org/small": Repository({"model.safetensors": b"w" * 10, "original/tokenizer.model": b"o"}),
    }
    with HubServer(repositories, tokens=frozenset({"hf_member", "hf_stranger"})) as server:
        yield server


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("download_hf_assets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, hub, tmp_path, monkeypatch, capsys):
    """Call the script in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own retries

    def call(*argv: str, **environ: str) -> tuple[int, str, str]:
        code = script.main(argv, {"HF_ENDPOINT": hub.endpoint, **environ})
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def in_process(hub: HubServer, cwd: Path, *argv: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "HOME": str(cwd), "HF_ENDPOINT": hub.endpoint}
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=before,
    )


def fetched(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_without_arguments_from_any_folder(hub, tmp_path):
    done = in_process(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    target = tmp_path / "assets" / "hf" / "Llama-3.1-8B"
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert fetched(target) == {name: FILES[name] for name in names}
    assert sorted(done.stdout.split()) == [str(target / name) for name in names]
    assert "[2/4] generation_config.json" in done.stderr
    assert not [path for path in target.rglob("*") if path.is_symlink()]


def test_every_asset_can_be_asked_for(run, tmp_path):
    assert run("--assets", "index", "safetensors", "--local_dir", "w")[0] == 0
    weights = [name for name in FILES if "safetensors" in name]
    assert sorted(fetched(tmp_path / "w" / "Llama-3.1-8B")) == sorted(weights)
    assert run("--assets", "all", "--local_dir", "w/Llama-3.1-8B")[0] == 0
    expected = {name: body for name, body in FILES.items() if name not in ("README.md", "original/tokenizer.model")}
    assert fetched(tmp_path / "w" / "Llama-3.1-8B") == expected


def test_the_original_tokenizer_and_one_file_weights(run, tmp_path):
    assert run("--repo_id", "org/small", "--assets", "tokenizer", "index", "safetensors")[0] == 0
    assert sorted(fetched(tmp_path / "assets" / "hf" / "small")) == ["model.safetensors", "original/tokenizer.model"]


def test_a_second_call_fetches_nothing(run, hub, tmp_path):
    run()
    hub.requests.clear()
    assert run()[0] == 0
    assert not [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]


def test_a_gated_repository_names_licence_and_token(run, hub):
    code, out, err = run("--repo_id", "org/gated")
    assert (code, out) == (2, "")
    assert f"accept the licence at {hub.endpoint}/org/gated" in err
    assert "HF_TOKEN" in err
    code, _, err = run("--repo_id", "org/gated", HF_TOKEN="hf_stranger")
    assert code == 2
    assert "ask for access" in err


def test_tokens_come_by_variable_or_flag(run):
    assert run("--repo_id", "org/gated", HF_TOKEN="hf_member")[0] == 0
    assert run("--repo_id", "org/gated", "--hf_token", "hf_member", "--local_dir", "b", HF_TOKEN="hf_stranger")[0] == 0
    code, _, err = run("--repo_id", "org/gated", HF_TOKEN="hf_typo")
    assert code == 2
    assert "does not accept the token" in err
    assert "hf_typo" not in err


@pytest.mark.parametrize(("name", "expected"), [("org/none", "no such repository"), ("a b/c", "OWNER/NAME")])
def test_a_repository_that_is_not_there(run, name, expected):
    code, _, err = run("--repo_id", name)
    assert code == 2
    assert expected in err


def test_an_asset_that_is_not_there(run):
    code, _, err = run("--repo_id", "org/small", "--assets", "config")
    assert code == 2
    assert "config" in err
    assert "allowed: tokenizer, safetensors" in err


def test_an_unknown_asset_is_refused(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--assets", "weights")
    assert "safetensors" in capsys.readouterr().err


def test_a_body_that_breaks_off_is_fetched_again(run, tmp_path):
    assert run("--repo_id", "org/flaky", "--assets", "safetensors")[0] == 0
    path = tmp_path / "assets" / "hf" / "flaky" / "model-00001-of-00002.safetensors"
    assert path.read_bytes() == FILES[path.name]


def test_a_connection_that_never_holds(run, tmp_path):
    code, out, err = run("--repo_id", "org/broken")
    assert (code, out) == (1, "")
    assert "broke off" in err
    assert fetched(tmp_path) == {}


def test_no_network(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([], {"HF_ENDPOINT": "http://127.0.0.1:9"}) == 1
    err = capsys.readouterr().err
    assert "no connection to http://127.0.0.1:9" in err
    assert "check the network" in err


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "taken").write_text("a file")
    code, _, err = run("--local_dir", "taken")
    assert code == 2
    assert "--local_dir" in err


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 128 KiB at the folder, where this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(hub, tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        # Where nothing can be mounted, no file may grow beyond 128 KiB: the same error by another number.
        limit = None if mounted else 128 << 10
        done = in_process(hub, tmp_path, "--assets", "all", "--local_dir", "disk", limit=limit)
        assert done.returncode == 1, done.stderr
        assert "no room left in disk" in done.stderr
        assert "Traceback" not in done.stderr
        assert "config.json" in fetched(tmp_path / "disk" / "Llama-3.1-8B"), "what came before is kept"
