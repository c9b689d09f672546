"""The `ctune` command: runs the service, and talks to one. Never imports torch."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsError

from cli import background, datasets, jobs, models
from cli.processes import fail
from cli.up import EXIT_CONFIG, Address, data_dir_of, run_up
from ctune.errors import CtuneError
from service.db import DatabaseSetupError, DatabaseUnavailableError
from service.db import migrate as migrate_database
from service.settings import Settings, get_settings

cli = typer.Typer(
    help="Contrastive tuning of image encoders, as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli.add_typer(datasets.cli, name="datasets")
cli.add_typer(jobs.cli, name="jobs")
cli.add_typer(models.cli, name="models")
cli.command("embed")(models.embed)

DataDir = Annotated[
    Path | None, typer.Option(help="Where everything is kept; else CTUNE_DATA_DIR, ./ctune-data.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; only this machine's own.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")]


@cli.command()
def up(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    data_dir: DataDir = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; print the address when ready.")
    ] = False,
) -> None:
    """Run everything on this machine: API, worker and embedding process."""
    settings = data_dir_of(_settings(), data_dir)
    if detach:
        place = str(settings.data_dir.absolute())
        arguments = ["--host", host, "--port", str(port), "--data-dir", place]
        raise typer.Exit(background.detach(settings.data_dir, arguments))
    raise typer.Exit(run_up(Address(host, port), settings))


@cli.command()
def down(data_dir: DataDir = None) -> None:
    """Stop the `ctune up` of a data directory."""
    raise typer.Exit(background.stop(data_dir_of(_settings(), data_dir).data_dir))


@cli.command()
def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run only the API."""
    _become("service.app", ["--host", host, "--port", str(port)])


@cli.command()
def worker() -> None:
    """Run only a worker."""
    _become("workers.app", [])


@cli.command()
def embed_server(host: Host = "127.0.0.1", port: Port = 8001) -> None:
    """Run only the embedding process."""
    _become("service.embeddings.app", ["--host", host, "--port", str(port)])


@cli.command()
def migrate() -> None:
    """Bring the database to this version."""
    try:
        migrate_database(_settings())
    except (DatabaseSetupError, DatabaseUnavailableError) as error:
        raise typer.Exit(fail(str(error))) from error
    print("the database is at this version")


@cli.command()
def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the effective settings, secrets masked."""
    settings = _settings()
    shown = {name: _masked(getattr(settings, name)) for name in Settings.model_fields}
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    for name, value in shown.items():
        is_set = f"CTUNE_{name.upper()}" in os.environ
        print(f"CTUNE_{name.upper()}={_text(value)}{'' if is_set else '  (default)'}")


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list) else str(value)


def _masked(value: object) -> object:
    if isinstance(value, SecretStr):
        parts = urlsplit(value.get_secret_value())
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://***@{parts.hostname or ''}{port}{parts.path}"
    return str(value) if isinstance(value, Path) else value


def _settings() -> Settings:
    try:
        return get_settings()
    except ValidationError as error:
        wrong = [
            f"CTUNE_{str(e['loc'][0]).upper()} is {e['input']!r}: {e['msg']}"
            for e in error.errors()
        ]
        raise typer.Exit(fail("; ".join(wrong), EXIT_CONFIG)) from error
    except SettingsError as error:  # not JSON where a list is wanted; names the field
        raise typer.Exit(fail(f"{error}: {error.__cause__}", EXIT_CONFIG)) from error


def _become(module: str, arguments: list[str]) -> None:
    # Another program rather than an import: only the embedding process may load torch.
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def app() -> None:
    """Run the command line; errors of the library and the service become one message."""
    try:
        cli()
    except CtuneError as error:
        hint = f"\n{error.hint}" if error.hint and error.hint not in str(error) else ""
        sys.exit(fail(f"{error}{hint}"))
    except (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError) as error:
        sys.exit(fail(str(error)))


if __name__ == "__main__":
    app()
