"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest

from ctune.checkpoint import save_checkpoint
from ctune.errors import ConfigError
from ctune.events import Warned
from ctune.resume import newest_checkpoint


def saved(folder: Path, step: int, fingerprint: str) -> Path:
    """Write a checkpoint of a run and return its folder."""
    state = {"fingerprint": fingerprint}
    save_checkpoint(folder, state, stage="contrastive", stage_index=0, step=step)
    return folder


def test_the_furthest_of_the_run_and_its_earlier_attempts(tmp_path: Path) -> None:
    own, earlier = saved(tmp_path / "a2", 4, "this"), saved(tmp_path / "a1", 3, "this")
    said: list[Warned] = []
    found = newest_checkpoint(own, [earlier], fingerprint="this", warn=said.append)
    assert found is not None and found[0].step == 4
    assert said == []


def test_checkpoints_of_another_run_in_the_same_directory_are_an_error(tmp_path: Path) -> None:
    own = saved(tmp_path / "run", 4, "other")
    with pytest.raises(ConfigError, match="another configuration"):
        newest_checkpoint(own, [], fingerprint="this", warn=print)


def test_an_earlier_attempt_of_another_version_is_left_out(tmp_path: Path) -> None:
    """A job is one configuration: its fingerprint changes with the version of ctune alone."""
    own, earlier = tmp_path / "a2", saved(tmp_path / "a1", 4, "of the version before")
    said: list[Warned] = []
    assert newest_checkpoint(own, [earlier], fingerprint="this", warn=said.append) is None
    assert [(one.code, "starts again" in one.hint) for one in said] == [("checkpoint_unfit", True)]
