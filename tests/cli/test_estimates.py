"""What `ctune jobs estimate` prints."""

import pytest

from cli.estimates import show_estimate
from service.jobs.estimate_routes import EXAMPLE


def test_an_estimate_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    show_estimate(EXAMPLE)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["contrastive", "4680", "599040", "2120", "4", "min", "42", "s"] in lines
    assert ["evaluation", "-", "-", "-", "13", "s"] in lines
    assert ["all", "-", "609040", "-", "5", "min", "44", "s"] in lines
    assert "memory: 9.25 GB" in printed
    assert "disk: 4.89 GB (decoded images 3.49 GB, checkpoints 1.31 GB, model 87 MB)" in printed
    assert "measured on NVIDIA H200, 16 cores of AMD EPYC 9554" in printed


def test_what_is_not_known_is_a_dash_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    unmeasured = {"images_per_s": None, "duration_s": None}
    nothing = dict.fromkeys(("decoded_images", "checkpoints", "model", "total"))
    unknown = {
        "stages": [stage | unmeasured for stage in EXAMPLE["stages"]],
        "disk_bytes": nothing,
        "memory_bytes": None,
        "duration_s": None,
        "duration": None,
        "measured": None,
        "reason": "the measurement failed: it does not fit",
        "error": {"code": "out_of_memory", "hint": "smaller batches"},
    }
    show_estimate(EXAMPLE | unknown)
    printed = capsys.readouterr().out
    assert ["contrastive", "4680", "599040", "-", "–"] in [x.split() for x in printed.splitlines()]
    assert "memory: –" in printed
    assert "the measurement failed: it does not fit" in printed
    assert "smaller batches" in printed
