"""Settings of the service and its workers: the only reader of environment variables `CTUNE_*`."""

import sys
from functools import cache
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Effective settings; the defaults are the embedded set-up on one machine."""

    model_config = SettingsConfigDict(
        env_prefix="CTUNE_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    data_dir: Path = Path("ctune-data")
    """Where uploads, data sets, runs, models and the SQLite file live."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL, `postgresql+psycopg://…`; none for SQLite inside `data_dir`."""
    broker_url: SecretStr | None = None
    """Celery broker, `redis://…` or `amqp://…`; none: workers poll the database."""
    embed_url: str = "http://127.0.0.1:8001"
    """Base address of the embedding process."""

    max_upload_bytes: int = 20 * 2**30
    """Largest archive."""
    max_unpacked_bytes: int = 100 * 2**30
    """Largest sum of an archive's members."""
    max_image_bytes: int = 64 * 2**20
    """Largest image file."""
    max_image_pixels: int = 50_000_000
    """Largest image area."""
    max_images: int = 10_000_000
    """Most members of an archive."""

    slots: int = 1
    """Jobs that one worker runs at the same time; one ingestion may run beside them."""
    gpus: str = "auto"
    """GPU indices of this worker, `0,1`; `auto`: all that the machine has; `none`: CPU only."""
    poll_s: float = 1.0
    """Seconds between looks for work."""
    beat_s: float = 10.0
    """Seconds between heartbeats of a running child."""
    lease_s: float = 60.0
    """Seconds without a heartbeat after which a job belongs to nobody."""
    fence_s: float = 45.0
    """Seconds without a renewed lease after which a child stops itself."""
    grace_s: float = 30.0
    """Seconds between SIGTERM and SIGKILL of a child; the end of its lease may come first."""
    reap_s: float = 10.0
    """Seconds between rounds that look for lost jobs."""
    resend_s: float = 30.0
    """Seconds after which a queued job without a claim is announced to the broker again."""
    retry_backoff_s: float = 5.0
    """Seconds before a lost job's second attempt; doubles with every further one."""
    max_attempts: int = 3
    """Attempts of a job or an ingestion before it fails for good."""
    train_command: list[str] = [sys.executable, "-m", "ctune.run"]
    """Program that trains; gets the run directory as its last argument."""
    ingest_command: list[str] = [sys.executable, "-m", "ctune.ingest"]
    """Program that ingests; gets the run directory as its last argument."""
    calibrate_command: list[str] = [sys.executable, "-m", "ctune.calibrate"]
    """Program that measures for an estimate; gets the run directory as its last argument."""

    allow_noncommercial_weights: bool = False
    """Jobs may start from weights whose licence forbids commercial use, e.g. those of MAE."""

    max_pending_images: int = 512
    """Images that may wait in the embedding process before it answers 429."""
    max_batch_images: int = 64
    """Images per forward pass of the embedding process."""
    model_cache_bytes: int = 2 * 2**30
    """Memory that loaded models may take in the embedding process."""

    @property
    def database(self) -> str:
        """The database URL in force."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data_dir.absolute() / 'ctune.sqlite'}"

    @property
    def broker(self) -> str | None:
        """The broker URL in force, or none."""
        return self.broker_url.get_secret_value() if self.broker_url else None


@cache
def get_settings() -> Settings:
    """Return the settings of this process, read once from the environment."""
    return Settings()
