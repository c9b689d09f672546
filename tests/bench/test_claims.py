"""The commands of docs/claims.md run, on a few squares."""

import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench.claims import combined, lacvit, mae_ct, mae_start, top_k
from bench.claims.runs import SIZES, Bench, parse, vit, with_interval
from tests.squares import SIDE_PX, write_archive

pytestmark = pytest.mark.slow

SIZE = replace(
    SIZES["cpu"],
    train_per_class=24,
    labelled_per_class=22,
    test_per_class=6,
    encoder=vit(embed_dim=24, depth=2, num_heads=2) | {"image_size_px": SIDE_PX},
    mae={"epochs": 1, "batch_size": 12},
    mae_ct={"batch_size": 12, "head": {"queue_size": 24}},
    head_init={"epochs": 1},
    tuning={"epochs": 1},
    combined={"epochs": 1, "batch_size": 12},
    supervised_epochs=2,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The claims at the size of a test; one start for all of them."""
    folder = tmp_path_factory.mktemp("claims")
    squares = write_archive(folder / "squares.zip", train_per_class=24)
    with zipfile.ZipFile(squares) as source, tarfile.open(folder / "cifar.tar", "w") as target:
        for name in source.namelist():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = source.getinfo(name).file_size
            target.addfile(member, io.BytesIO(source.read(name)))
    return Bench(cifar=folder / "cifar.tar", work_dir=folder, device="cpu", size=SIZE, seeds=[0])


def titles(output: str) -> list[str]:
    """Return the first cell of every row below the head."""
    rows = [line.split(" | ")[0] for line in output.splitlines() if line.startswith("| ")]
    return [row.removeprefix("| ") for row in rows[2:]]


def test_the_start_is_made_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    mae_start.main(bench)
    assert titles(capsys.readouterr().out) == ["MAE"]
    models = [path.stat().st_mtime_ns for path in bench.work_dir.glob("mae-*/model/model.json")]
    mae_start.mae_start(bench)
    again = [path.stat().st_mtime_ns for path in bench.work_dir.glob("mae-*/model/model.json")]
    assert models == again and len(models) == 1


def test_mae_ct(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    mae_ct.main(bench)
    output = capsys.readouterr().out
    assert titles(output) == ["MAE", "`head_init`", "MAE-CT"]
    heads = [line.split(" | ")[-3] for line in output.splitlines()[2:]]
    assert [bool(head) for head in heads] == [False, True, True]


def test_top_k(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_k, "KS", (1, 3))
    top_k.main(bench)
    assert titles(capsys.readouterr().out) == ["MAE", "k 1", "k 3"]


def test_combined(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    combined.main(bench)
    output = capsys.readouterr().out
    assert titles(output) == ["MAE", "MAE, then MAE-CT", "combined"]
    passes = [line.split(" | ")[-2] for line in output.splitlines()[2:]]
    assert passes == ["72", "360", "144"]


def test_lacvit(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    lacvit.main(bench)
    output = capsys.readouterr().out
    assert titles(output) == ["MAE, frozen, linear classifier", "LaCViT", "`ce_sgd`", "`ce_mae`"]


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cifar", "c.tar", "--device", "cpu", "--seeds", "3", "--work-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["claim", *words])
    bench = parse("About.")
    assert (bench.cifar, bench.seeds, bench.work_dir) == (Path("c.tar"), [3], tmp_path)
    assert "seeds [3]" in capsys.readouterr().out


def test_the_interval_is_that_of_student() -> None:
    assert with_interval([]) == ""
    assert with_interval([0.5]) == "0.500"
    assert with_interval([0.4, 0.5, 0.6]) == "0.500 ± 0.248"  # 4.303 · 0.1 / √3
