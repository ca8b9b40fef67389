"""What of a checkpoint of torchtitan goes on that is no tensor, and the one line about what could not be known."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.config.schema import Dataloader, Training, TrainingSource
from quadriga.errors import Problem, UserError
from quadriga.train.resume import resume_from_titan


class Loader:
    at: tuple[int, int] | None = None

    def start_at(self, documents: int, tokens_left: int) -> None:
        if documents > 100:
            raise UserError(Problem("the training data", "hold 100 documents"))
        self.at = documents, tokens_left


def go_on(extra: dict[str, Any], shuffle: bool = False, overlap: int = 0, **data: Any) -> SimpleNamespace:
    training = Training(dataloader=Dataloader(shuffle=shuffle, window_overlap=overlap), **data)
    config = SimpleNamespace(training=training)
    run: Any = SimpleNamespace(config=config, spec=SimpleNamespace(tokens_per_step=100))
    state: Any = SimpleNamespace(step=0, tokens_seen=0, loader=Loader())
    resume_from_titan(run, state, CheckpointInfo(7, "step-7", ("model", "optimizer"), extra, trainer="torchtitan"))
    return state


PLACE = {"ranks": 1, "documents": 5, "tokens_left": 30}
CASES = {
    "in order": (PLACE, False, 0, (5, 30), None),
    "windows that overlap": (PLACE, False, 1, (5, 30), "window_overlap = 0 to read as torchtitan does"),
    "shuffled": (PLACE, True, 0, None, "to continue there: training.dataloader.shuffle = false"),
    "other data": (
        {**PLACE, "documents": 101},
        False,
        0,
        None,
        "not restored: the training data hold 100 documents.",
    ),
    "of two ranks": ({"ranks": 2, "unknown": "two ranks"}, False, 0, None, "not restored: two ranks. Reading begins"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_place_in_the_data(name, caplog):
    saved, shuffle, overlap, at, expected = CASES[name]
    with caplog.at_level(logging.WARNING):
        state = go_on({"dataloader": saved}, shuffle, overlap)
    assert state.loader.at == at
    assert [expected in record.getMessage() for record in caplog.records] == ([True] if expected else [])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("what", ["token files", "a mixture"])
def test_other_data_have_no_such_place(caplog, shuffle, what):
    mixture = {"sources": (TrainingSource(dataset="builtin", weight=1.0),)}
    with caplog.at_level(logging.WARNING):
        state = go_on({"dataloader": PLACE}, shuffle, **({"dataset": "tokens"} if what == "token files" else mixture))
    assert state.loader.at is None
    assert f"{what}, in which torchtitan has no position. Reading begins" in caplog.text
    assert "training.dataloader.shuffle" not in caplog.text


def test_the_first_rank_alone_logs_it(monkeypatch, caplog):
    monkeypatch.setattr("quadriga.comm.collectives.rank", lambda: 1)
    with caplog.at_level(logging.WARNING):
        go_on({"train_state": {"step": 7, "tokens_seen": None}, "dataloader": PLACE}, shuffle=True)
        go_on({"dataloader": PLACE}, overlap=1)
    assert not caplog.records


def test_it_logs_where_reading_continues(caplog):
    with caplog.at_level(logging.INFO):
        go_on({"dataloader": PLACE})
    assert "where torchtitan stopped: 5 documents read, 30 ids left to train on" in caplog.text


def test_the_step_and_the_tokens(caplog):
    state = go_on({"train_state": {"step": 7, "tokens_seen": 1234}})
    assert (state.step, state.tokens_seen) == (7, 1234)
    with caplog.at_level(logging.WARNING):
        assert go_on({"train_state": {"step": 7, "tokens_seen": None}}).tokens_seen == 700
    assert "the number of tokens seen" in caplog.text


def test_parts_that_are_left_out_stay():
    state = go_on({})
    assert (state.step, state.tokens_seen, state.loader.at) == (0, 0, None)
