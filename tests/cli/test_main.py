"""The command line without a service: settings, refusals, messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import clean_environment


def ctune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "cli.main", *arguments],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_line_never_loads_torch() -> None:
    said = "import cli.main, ctune.client, sys; print([m for m in sys.modules if m == 'torch'])"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_config_masks_secrets() -> None:
    url = "postgresql+psycopg://anna:hidden@db.example:5433/ctune?password=hidden"
    shown = ctune("config", "--json", CTUNE_DATABASE_URL=url, CTUNE_SLOTS="3")
    values = json.loads(shown.stdout)
    assert values["database_url"] == "postgresql+psycopg://***@db.example:5433/ctune"
    assert values["slots"] == 3
    plain = ctune("config", CTUNE_DATABASE_URL=url, CTUNE_SLOTS="3")
    assert "hidden" not in plain.stdout + shown.stdout
    assert "CTUNE_SLOTS=3\n" in plain.stdout
    assert "CTUNE_POLL_S=1.0  (default)" in plain.stdout


@pytest.mark.parametrize(
    ("name", "value"), [("CTUNE_SLOTS", "many"), ("CTUNE_TRAIN_COMMAND", "not json")]
)
def test_wrong_setting_is_named(name: str, value: str) -> None:
    refused = ctune("config", **{name: value})
    assert refused.returncode == 78
    assert name.removeprefix("CTUNE_").lower() in refused.stderr.lower()
    assert "Traceback" not in refused.stderr


def test_migrate_makes_the_database(tmp_path: Path) -> None:
    for _ in range(2):
        done = ctune("migrate", CTUNE_DATA_DIR=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "ctune.sqlite").exists()


def test_migrate_says_what_is_wrong_with_the_database() -> None:
    refused = ctune("migrate", CTUNE_DATABASE_URL="mysql://localhost/ctune")
    assert refused.returncode == 1
    assert "postgresql+psycopg://" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_down_without_anything(tmp_path: Path) -> None:
    done = ctune("down", "--data-dir", str(tmp_path / "none"))
    assert done.returncode == 0
    assert "nothing runs" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_no_service_is_one_message() -> None:
    refused = ctune("jobs", "list", "--url", "http://127.0.0.1:1")
    assert refused.returncode == 1
    assert "http://127.0.0.1:1 does not answer" in refused.stderr
    assert "ctune up" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[]", "must hold a JSON object")]
)
def test_job_file_must_be_an_object(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.json").write_text(text)
    refused = ctune("jobs", "create", str(tmp_path / "job.json"))
    assert refused.returncode == 1
    assert said in refused.stderr
    missing = ctune("jobs", "create", str(tmp_path / "none.json"))
    assert missing.returncode == 1
    assert "none.json" in missing.stderr
