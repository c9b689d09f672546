"""`ctune datasets`: upload, list, show, delete."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cli.output import URL, AsJson, Limit, Url, age, console, errors, print_json, print_table
from ctune.client import Client
from ctune.schema import JsonObject

cli = typer.Typer(help="Data sets of the service.", no_args_is_help=True)

SHOWN_ISSUES = 10
DatasetId = Annotated[str, typer.Argument(help="ds_…", show_default=False)]


@cli.command()
def push(
    archive: Annotated[Path, typer.Argument(exists=True, help="zip, tar, tar.gz, tar.zst, folder")],
    name: Annotated[str | None, typer.Option(help="Its name; else the file's.")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Part held out where the archive gives no split.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is ready and show the report.")] = True,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Upload an archive or a folder of images."""
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Client(url) as client:
        with Progress(*columns, console=errors, disable=as_json, transient=True) as bar:
            task = bar.add_task("upload")
            dataset = client.datasets.push(
                archive,
                name=name,
                options={} if test_fraction is None else {"test_fraction": test_fraction},
                on_progress=lambda sent, total: bar.update(task, completed=sent, total=total),
            )
        if wait:
            with errors.status("the service looks at every image"):
                dataset = client.datasets.wait(dataset["id"])
    _show(dataset, as_json)


@cli.command("list")
def list_datasets(limit: Limit = 20, url: Url = URL, as_json: AsJson = False) -> None:
    """List data sets, newest first."""
    with Client(url) as client:
        found = client.datasets.list(limit=limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (d["id"], d["name"], d["status"], (d.get("summary") or {}).get("num_images"),
         age(d.get("created_at")))
        for d in found
    ]  # fmt: skip
    print_table(("id", "name", "status", "images", "age"), rows)


@cli.command()
def show(dataset: DatasetId, url: Url = URL, as_json: AsJson = False) -> None:
    """Show a data set and what ingestion found in it."""
    with Client(url) as client:
        _show(client.datasets.get(dataset), as_json)


@cli.command()
def delete(dataset: DatasetId, url: Url = URL, as_json: AsJson = False) -> None:
    """Remove a data set and its files."""
    with Client(url) as client:
        gone = client.datasets.delete(dataset)
    print_json(gone) if as_json else console.print(f"{dataset} deleted")


def _show(dataset: JsonObject, as_json: bool) -> None:
    if as_json:
        print_json(dataset)
        return
    console.print(f"{dataset['id']}  {dataset['name']}  [bold]{dataset['status']}[/bold]")
    if dataset.get("error"):
        console.print(f"{dataset['error']['message']} {dataset['error'].get('hint') or ''}")
    summary, report = dataset.get("summary"), dataset.get("report")
    if summary:
        rows = [
            (split, count, len([n for n in summary["class_counts"].get(split, {}).values() if n]))
            for split, count in summary["splits"].items()
        ]
        print_table(("split", "images", "classes"), rows)
        console.print(f"split: {summary['split_origin']}")
    if report:
        _show_report(report)


def _show_report(report: JsonObject) -> None:
    console.print(
        f"layout {report['layout']}; {report['num_unreadable']} unreadable,"
        f" {report['num_junk']} ignored system files, {report['num_duplicates']} duplicates,"
        f" {report['num_split_leaks']} images of a held-out split also in the training split"
    )
    for issue in [*report["warnings"], *report["unreadable"]][:SHOWN_ISSUES]:
        said = ": ".join(part for part in (issue["code"], issue["path"], issue["detail"]) if part)
        console.print(f"  {said}", markup=False)
