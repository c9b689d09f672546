"""`ctune jobs`: create, estimate, watch, list, show, cancel, stop, pause, resume."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cli.comparisons import report_rows, show_comparison
from cli.estimates import show_estimate
from cli.output import (
    URL,
    AsJson,
    Limit,
    Url,
    age,
    console,
    errors,
    print_json,
    print_line,
    print_table,
)
from ctune.client import Client
from ctune.client_http import ServerEvent
from ctune.errors import ConfigError
from ctune.schema import JsonObject
from ctune.scores import score_rows

cli = typer.Typer(help="Jobs: one run of one method on one data set.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="job_…", show_default=False)]


@cli.command()
def create(
    body: Annotated[Path, typer.Argument(help="JSON file with the job; - for standard input.")],
    dataset: Annotated[str | None, typer.Option(help="ds_…, instead of the file's.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name, instead of the file's.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Start a job."""
    given = {"dataset": dataset, "name": name}
    job = _read(body) | {key: value for key, value in given.items() if value is not None}
    with Client(url) as client:
        created = client.jobs.create(job)
        if not watch:
            _show(created, as_json)
            return
        console.print(created["id"], highlight=False) if not as_json else print_line(created)
        _follow(client, created["id"], as_json)


@cli.command()
def estimate(
    body: Annotated[Path, typer.Argument(help="JSON file with the job; - for standard input.")],
    dataset: Annotated[str | None, typer.Option(help="ds_…, instead of the file's.")] = None,
    wait_s: Annotated[float, typer.Option(min=0, help="Wait so long for a measurement.")] = 60.0,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Say what a job would take, without starting it. Fails when it could not run."""
    job = _read(body) | ({"dataset": dataset} if dataset is not None else {})
    with Client(url) as client:
        found = client.jobs.estimate(job, wait_s=wait_s)
    if as_json:
        print_json(found)
    else:
        show_estimate(found)
    if found["error"]:
        raise typer.Exit(1)


@cli.command()
def watch(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Follow a job to its end; with --json one line per event. Fails when the job fails."""
    with Client(url) as client:
        _follow(client, job, as_json)


@cli.command("list")
def list_jobs(limit: Limit = 20, url: Url = URL, as_json: AsJson = False) -> None:
    """List jobs, newest first."""
    with Client(url) as client:
        found = client.jobs.list(limit=limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (j["id"], j.get("name"), j["config"]["method"]["name"], j["status"], _percent(j),
         age(j.get("created_at")))
        for j in found
    ]  # fmt: skip
    print_table(("id", "name", "method", "status", "done", "age"), rows)


@cli.command()
def show(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Show a job and, once it has succeeded, what it achieved."""
    with Client(url) as client:
        _show(client.jobs.get(job), as_json)


@cli.command()
def cancel(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Abort a job; nothing of it is kept but its checkpoints."""
    with Client(url) as client:
        _show(client.jobs.cancel(job), as_json)


@cli.command()
def stop(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Let a running job finish early: evaluate what is trained, and keep the model."""
    with Client(url) as client:
        _show(client.jobs.stop(job), as_json)


@cli.command()
def pause(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Keep a job from running; a running one makes a checkpoint first."""
    with Client(url) as client:
        _show(client.jobs.pause(job), as_json)


@cli.command()
def resume(job: JobId, url: Url = URL, as_json: AsJson = False) -> None:
    """Queue a paused job again; it goes on from its last checkpoint."""
    with Client(url) as client:
        _show(client.jobs.resume(job), as_json)


@cli.command()
def report(
    job: JobId,
    html: Annotated[
        Path | None, typer.Option(help="Write it as one page that loads nothing.")
    ] = None,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Show what a job gained; with --html write the whole report into a file."""
    with Client(url) as client:
        if html is not None:
            html.write_text(client.jobs.report_page(job), encoding="utf-8")
            console.print(str(html), markup=False, highlight=False)
            return
        found = client.jobs.report(job)
    if as_json:
        print_json(found)
        return
    print_table(("score", "before", "after"), report_rows(found))
    for warning in found["warnings"]:
        console.print(f"warning: {warning['message']}", markup=False, highlight=False)


@cli.command()
def compare(
    jobs: Annotated[list[str], typer.Argument(help="job_… job_… …", show_default=False)],
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Compare the scores of 2 to 50 jobs."""
    with Client(url) as client:
        found = client.jobs.compare(jobs)
    if as_json:
        print_json(found)
    else:
        show_comparison(found)


@cli.command()
def logs(job: JobId, url: Url = URL) -> None:
    """Print what the training process has printed."""
    with Client(url) as client:
        console.print(client.jobs.logs(job), markup=False, highlight=False, end="")


def _read(body: Path) -> JsonObject:
    text = sys.stdin.read() if str(body) == "-" else body.read_text(encoding="utf-8")
    try:
        job = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{body} is not JSON: {error}") from error
    if not isinstance(job, dict):
        raise ConfigError(f"{body} must hold a JSON object, not {type(job).__name__}")
    return job


def _follow(client: Client, job: str, as_json: bool) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=errors, disable=as_json, transient=True) as bar:
        task = bar.add_task("waiting", total=1.0)
        for event in client.jobs.watch(job):
            if as_json:
                print_line({"id": event.id, "event": event.kind, "data": event.data})
                continue
            bar.update(task, **_progress(event))
            if event.data.get("message"):
                bar.console.print(event.data["message"], markup=False, highlight=False)
    ended = client.jobs.get(job)
    if not as_json:
        _show(ended, as_json)
    if ended["status"] != "succeeded":
        raise typer.Exit(1)


def _progress(event: ServerEvent) -> JsonObject:
    told = event.data.get("data") or {}
    if event.kind == "status":  # queued, paused …, until a stage tells of itself
        return {"description": told["status"]}
    if "fraction" not in told:
        return {}
    return {"completed": told["fraction"], "description": told.get("stage", "")}


def _percent(job: JsonObject) -> str | None:
    progress = job.get("progress") or {}
    return f"{100 * progress['fraction']:.0f} %" if "fraction" in progress else None


def _show(job: JsonObject, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    phase = f" ({job['phase']})" if job.get("phase") else ""
    console.print(f"{job['id']}  {job.get('name') or ''}  [bold]{job['status']}[/bold]{phase}")
    if job.get("error"):
        console.print(f"{job['error']['message']} {job['error'].get('hint') or ''}", markup=False)
    result = job.get("result") or {}
    if result.get("evaluation"):
        print_table(("score", "before", "after"), evaluation_rows(result["evaluation"]))
        console.print(f"model: {result['model']}")


def evaluation_rows(evaluation: JsonObject) -> list[tuple[str, str, str]]:
    """Return (score, before, after) for every score of an evaluation."""
    before = dict(score_rows(evaluation.get("before") or {}))
    after = score_rows(evaluation.get("after") or {})
    return [(" ".join(path), _number(before.get(path)), _number(v)) for path, v in after]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
