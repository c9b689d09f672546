"""`examples/digits.py`, which `make demo` runs, against a real `ctune up`."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.running import Running, clean_environment

EXAMPLE = Path(__file__).parents[2] / "examples/digits.py"
WITHIN_S = 240
ROW = re.compile(r"│ (\w+ \w+) +│ (\S+) +│ (\S+) +│")
NEIGHBOURS = re.compile(r"a new (\d); nearest uploaded: ((?:\d \(-?\d\.\d{3}\)(?:, )?){5})$", re.M)


class Told(NamedTuple):
    """What the example printed."""

    scores: dict[str, tuple[str, str]]
    """Protocol and metric -> before, after."""
    neighbours: dict[str, str]
    """Digit kept back -> nearest uploaded ones."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all runs of the example."""
    made = Running(tmp_path_factory.mktemp("demo") / "data")
    try:
        yield made.wait_ready()
        assert made.stop() == 0, made.log()
        assert "Traceback" not in made.log(), made.log()
    finally:
        made.discard()


def run_example(service: Running, epochs: int) -> Told:
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--url", service.url, "--epochs", str(epochs)],
        env=clean_environment() | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr + service.log()
    assert "Traceback" not in done.stderr
    scores = {name: (before, after) for name, before, after in ROW.findall(done.stdout)}
    told = Told(scores, dict(NEIGHBOURS.findall(done.stdout)))
    for name in ("knn top1", "linear_probe top1", "classifier top1"):
        assert 0 <= float(told.scores[name][1]) <= 1, done.stdout
    assert told.scores["classifier top1"][0] == "-"  # there is none before tuning
    assert told.neighbours.keys() == {"3", "5", "8"}, done.stdout
    return told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_again_on_the_same_service_tells_the_same(service: Running) -> None:
    first, second = (run_example(service, epochs=4) for _ in range(2))
    assert first.scores == second.scores
    before, after = (float(score) for score in first.scores["knn top1"])
    assert after > before
