"""Checkpoints are complete or absent, verified before use, and give back what was saved."""

from pathlib import Path

import pytest
import torch

from ctune.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ctune.errors import CheckpointError


def adamw_state() -> dict[str, object]:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {"modules": layer.state_dict(), "optimizer": optimizer.state_dict(), "before": None}


def save(folder: Path, step: int, stage_index: int = 0) -> Path:
    save_checkpoint(folder, adamw_state(), stage="contrastive", stage_index=stage_index, step=step)
    return folder / f"contrastive-{step:08d}"


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = adamw_state()
    save_checkpoint(tmp_path, state, stage="contrastive", stage_index=1, step=7)
    manifest, loaded = load_checkpoint(tmp_path / "contrastive-00000007")
    assert manifest.order == (1, 7)
    assert loaded["before"] is None
    for name, tensor in state["modules"].items():  # type: ignore[attr-defined]
        assert torch.equal(loaded["modules"][name], tensor)
    moments = loaded["optimizer"]["state"]["0"]["exp_avg"]
    assert torch.equal(moments, state["optimizer"]["state"][0]["exp_avg"])  # type: ignore[index]


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    save_checkpoint(tmp_path, {"a": weight, "b": weight[:3]}, stage="s", stage_index=0, step=0)
    _, loaded = load_checkpoint(tmp_path / "s-00000000")
    assert torch.equal(loaded["a"][:3], loaded["b"])


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(file.parent)


def test_a_missing_manifest_is_an_error_and_sorts_last(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 9)
    (bad / "manifest.json").unlink()
    assert find_checkpoints([tmp_path]) == [good, bad]
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(bad)


def test_newest_first_over_stages_and_attempts(tmp_path: Path) -> None:
    first, second = tmp_path / "a1", tmp_path / "a2"
    late_stage = save(first, 3, stage_index=1)
    early_stage = save(second, 500)
    assert find_checkpoints([second, first]) == [late_stage, early_stage]


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctune.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    load_checkpoint(old)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_prune_keeps_what_is_named(tmp_path: Path) -> None:
    names = [save(tmp_path, step).name for step in (1, 2, 3)]
    assert prune_checkpoints(tmp_path, keep=names[1:]) == names[1:]
    assert find_checkpoints([tmp_path]) == [tmp_path / names[2], tmp_path / names[1]]
