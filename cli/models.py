"""`ctune models` and `ctune embed`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cli.output import (
    URL,
    AsJson,
    Limit,
    Url,
    age,
    console,
    megabytes,
    print_json,
    print_line,
    print_table,
)
from ctune.client import Client

cli = typer.Typer(help="Models: the results of jobs.", no_args_is_help=True)

ModelId = Annotated[str, typer.Argument(help="mdl_…", show_default=False)]


@cli.command("list")
def list_models(limit: Limit = 20, url: Url = URL, as_json: AsJson = False) -> None:
    """List models, newest first."""
    with Client(url) as client:
        found = client.models.list(limit=limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (m["id"], m.get("name"), m.get("job"), megabytes(m.get("size_bytes")),
         age(m.get("created_at")))
        for m in found
    ]  # fmt: skip
    print_table(("id", "name", "job", "size", "age"), rows)


@cli.command()
def show(model: ModelId, url: Url = URL, as_json: AsJson = False) -> None:
    """Show a model: architecture, preprocessing, classes, licence."""
    with Client(url) as client:
        found = client.models.get(model)
    print_json(found) if as_json else console.print(found)


@cli.command()
def pull(
    model: ModelId,
    folder: Annotated[Path | None, typer.Argument(help="New folder; else ./MODEL.")] = None,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Download a model as a folder that timm loads."""
    with Client(url) as client:
        place = client.models.pull(model, folder or Path(model)).absolute()
    if as_json:
        print_json({"model": model, "path": str(place)})
        return
    console.print(f"{place}\ntimm.create_model('local-dir:{place}', pretrained=True)", markup=False)


@cli.command()
def delete(model: ModelId, url: Url = URL, as_json: AsJson = False) -> None:
    """Remove a model and its files."""
    with Client(url) as client:
        gone = client.models.delete(model)
    print_json(gone) if as_json else console.print(f"{model} deleted")


def embed(
    model: ModelId,
    images: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="Write a .npy file, one row per image.")] = None,
    normalize: Annotated[bool, typer.Option(help="Scale each vector to unit length.")] = False,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Turn image files into vectors: one JSON line per image, or a .npy file."""
    with Client(url) as client:
        vectors = client.embed(model, images, normalize=normalize)
    if out is not None:
        np.save(out, vectors)
        shape = list(vectors.shape)
        print_json({"path": str(out), "shape": shape}) if as_json else console.print(
            f"{out}: {shape[0]} vectors of {shape[1]} dimensions", markup=False
        )
        return
    for path, vector in zip(images, vectors, strict=True):
        print_line({"path": str(path), "embedding": [round(float(v), 7) for v in vector]})
