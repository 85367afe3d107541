"""Training as a function: what a notebook calls. The loop has its tests in `test_resume.py` and `pod/`."""

from __future__ import annotations

import copy

import toyrun
from harness import finished_steps

from mmjax.train import train


def test_a_workdir_may_be_relative_and_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = train(toyrun.block("steps=4"), "some/run")
    assert records and finished_steps(tmp_path / "some" / "run") == (4,)


def test_the_config_that_is_given_is_not_changed(tmp_path):
    block = toyrun.block("steps=4")
    before = copy.deepcopy(block)
    train(block, tmp_path / "run")
    assert block == before
