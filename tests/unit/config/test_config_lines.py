"""The line of a key in a report is where the key stands, in every form that TOML allows."""

from __future__ import annotations

import pytest

from quadriga.cli.main import main

TEXTS = {
    'a comment with """ in it': '# """ a comment\n\n[training]\nseq_len = "x"  # line 4\n',
    "a comment with ''' behind a value": "[training]\nsteps = 3 # '''\nseq_len = \"x\"  # line 3\n",
    "quoted names": '\n["training"]\n"seq_len" = "x"  # line 3\n',
    "an escape in a name": '\n[training]\n"seq\\u005flen" = "x"  # line 3\n',
    "dots with spaces": '\n\ntraining . seq_len = "x"  # line 3\n',
    "an inline table": '\n\ntraining = { steps = 0x10, seq_len = "x" }  # line 3\n',
    "spaces in a header": '[ training ]\n\nseq_len = "x"  # line 3\n',
    "a text like a table": '[job]\ndescription = """\n[training]\na = 3\n"""\n[training]\nseq_len = "x"  # line 7\n',
    "a text that ends in quotation marks": '[job]\ndescription = """a"""""\n[training]\nseq_len = "x"  # line 4\n',
    "a literal text": "[job]\ndescription = '''\n[training]\nseq_len = 1\n\\'''\n[training]\nseq_len = 'x'  # line 7\n",
    "a list on several lines": '[model]\nconverters = [ # ]\n  "[",\n]\n[training]\nseq_len = "x"  # line 6\n',
    "carriage returns": '[training]\r\n\r\nseq_len = "x"  # line 3\r\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_report_names_the_line_of_the_key(name, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_bytes(TEXTS[name].encode())
    assert main(["estimate", str(file)]) == 2
    line = TEXTS[name].partition("# line ")[2][:1]
    assert f'training.seq_len = "x"  [{file}, line {line}]' in capsys.readouterr().err


def test_a_table_that_is_written_as_a_list_is_told_so(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[[training]]\nseq_len = 3\n")
    assert main(["estimate", str(file)]) == 2
    report = capsys.readouterr().err
    assert "training = [{seq_len = 3}]" in report
    assert "this is one table: [training], not [[training]]" in report


def test_a_line_break_in_a_name_looks_like_no_other_problem(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('["a\\n\\nforged = 3"]\nc = 1\n')
    assert main(["estimate", str(file)]) == 2
    assert all(not line.startswith("forged") for line in capsys.readouterr().err.splitlines())
    assert main(["compare", "a", "b", "--html", "none/x\n\nforged"]) == 2
    assert all(not line.startswith("forged") for line in capsys.readouterr().err.splitlines())


def test_an_empty_name_of_a_file_is_no_run_of_the_defaults(capsys):
    """As of a variable that is not set: quadriga train "$FILE"."""
    for command in (["estimate", ""], ["dry-run", ""], ["search", "", "--ngpu", "1", "--device", "cpu"]):
        assert main(command) == 2
        assert "is empty" in capsys.readouterr().err


def test_an_estimate_expands_variables_as_a_dry_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COMM_BACKEND", "no backend")
    (tmp_path / "base.toml").write_text("[training]\nseq_len = 64\n")
    monkeypatch.setenv("BASES", str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text('extends = "$BASES/base.toml"\n[job]\ndump_folder = "$RUNS/a"\n')
    assert main(["estimate", str(file)]) == 0
    assert "Estimate of llama3 debugmodel, 1 rank\n" in capsys.readouterr().out
    assert main(["search", str(file), "--ngpu", "1", "--device", "h100-80gb"]) == 0
    assert main(["card", str(file), "--ngpu", "1", "--print"]) == 0


def test_a_variable_that_is_not_closed_is_no_name_of_a_folder(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('[job]\ndump_folder = "${HOME/a"\n')
    assert main(["estimate", str(file)]) == 2
    assert "a `${` has no `}`" in capsys.readouterr().err
