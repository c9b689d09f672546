"""The report of a job as a page: every section of it in words, tables and pictures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ctune import __version__
from ctune.figures_file import FiguresFile
from ctune.methods import METHOD_CONFIGS
from ctune.schema import JsonObject
from service.jobs.html import render
from service.jobs.numerals import (
    difference,
    duration,
    moment,
    score,
    size,
    words,
)
from service.jobs.pictures import Pictures, curve
from service.jobs.score_table import score_groups

MAX_CURVES = 24
"""Of a stage."""
HEADLINES = (("knn", "top1"), ("linear_probe", "top1"), ("isotropy", "isotropy_score"))
FIRST_CURVES = ("loss", "accuracy", "top1", "knn", "lr", "online")
ENGINE_CURVES = ("grad_norm", "images_per_s", "data_wait", "steps_per_s")
"""Curves of how the engine runs; they are folded away on the screen."""
HIDDEN_CURVES = ("epoch",)
NOT_ENDED = ("queued", "running", "paused")
SHOWN_CLASSES = 12


class Sources(NamedTuple):
    """What a page is made of."""

    report: JsonObject
    """`service.jobs.report.report`."""
    figures: FiguresFile | None
    series: Sequence[JsonObject]
    """`service.jobs.metrics.columns`."""
    versions: Mapping[str, Any]
    """What the newest attempt ran with."""
    base_url: str


def report_page(sources: Sources, now: float) -> str:
    """Return the page."""
    return render(
        "report.html",
        now,
        report=sources.report,
        job=sources.report["job"],
        page=_page(sources, now),
    )


def _page(sources: Sources, now: float) -> JsonObject:
    report, pictures = sources.report, Pictures(sources.figures)
    job = report["job"]
    stages, left_out = _stages(sources.series, report["stages"])
    pairs_title, pairs = pictures.pairs()
    running = job["status"] in NOT_ENDED
    return {
        "title": job["name"] or job["id"],
        "lead": _lead(report),
        "facts": _facts(report),
        "fraction": (job["progress"] or {}).get("fraction", 0.0),
        "snapshot": f"As of {moment(now)}; load the page again for more." if running else "",
        "data": _data(report["dataset"]),
        "data_note": _data_note(report["dataset"]),
        "score_groups": score_groups(report),
        "no_scores": _no_scores(report, running),
        "stages": stages,
        "left_out": left_out,
        "no_pictures": _no_pictures(report, sources.figures, running),
        "cosines": pictures.cosines(),
        "confusions": pictures.confusions(),
        "pairs": pairs,
        "pairs_title": pairs_title,
        "class_bars": pictures.class_bars(),
        "maps": pictures.maps(),
        "legend": pictures.legend(),
        "gallery": pictures.gallery(),
        "labelled": pictures.labelled,
        "diagnostics": pictures.diagnostics(),
        "tables": pictures.tables(),
        "no_model": "The job makes it at its end." if running else "The job left no model.",
        "model": _model(report["model"]) if report["model"] else [],
        "snippet": _snippet(report["model"], sources.base_url) if report["model"] else "",
        "reproduce": _reproduce(sources),
        "citation": _citation(report),
        "config": json.dumps(
            {"dataset": report["dataset"]["id"], **report["config"]}, indent=2, ensure_ascii=False
        ),
    }


def _lead(report: JsonObject) -> str:
    """Return in a sentence how the job stands."""
    job = report["job"]
    status, progress = job["status"], job["progress"] or {}
    if status == "queued":
        return "The job waits for a worker."
    if status == "paused":
        return "The job is paused; it goes on from its last checkpoint once it is resumed."
    if status == "running":
        left = progress.get("seconds_remaining")
        said = f"The job runs: {words(job['phase'] or 'starting')}"
        return said + (f", about {duration(left)} left." if left is not None else ".")
    if status != "succeeded":
        ended = "was cancelled" if status == "cancelled" else f"has {status}"
        return f"The job {ended}; what it had measured until then is below."
    known = {
        (row["protocol"], row["metric"].rpartition(".")[2]): row for row in report["comparison"]
    }
    found = next((known[place] for place in HEADLINES if place in known), None)
    if found is None:
        return "The job has succeeded; nothing was evaluated."
    metric, after = found["metric"], found["after"]
    what = f"{words(found['protocol'])}, {words(metric)}"
    if found["difference"] is None:
        return f"{what}: {score(after, metric)}."
    change = difference(found["difference"], metric)
    unit = " percentage points" if score(1.0, metric).endswith("%") else ""
    before = score(found["before"], metric)
    return f"{what}: {before} before, {score(after, metric)} after tuning ({change}{unit})."


def _facts(report: JsonObject) -> list[tuple[str, Any]]:
    job, config = report["job"], report["config"]
    encoder, method = config["encoder"], config["method"]
    took = None
    if job["started_at"] and job["finished_at"]:
        took = duration(job["finished_at"] - job["started_at"])
    return [
        ("Job", job["id"]),
        ("Method", " ".join(str(method[key]) for key in ("name", "preset") if method.get(key))),
        ("Encoder", _encoder(encoder)),
        ("Created", moment(job["created_at"])),
        ("Took", took),
        *((f"{key} (metadata)", value) for key, value in (job["metadata"] or {}).items()),
    ]


def _encoder(encoder: Mapping[str, Any]) -> str:
    name = encoder.get("name") or encoder.get("id") or encoder.get("path") or encoder["source"]
    start = {True: ", pretrained", False: ", random weights"}.get(encoder.get("pretrained"), "")  # type: ignore[arg-type]
    size_px = encoder.get("image_size_px")
    return f"{name}{start}" + (f", {size_px} px" if size_px else "")


def _data(dataset: JsonObject) -> list[tuple[str, Any]]:
    summary = dataset["summary"]
    if summary is None:
        return [("Data set", dataset["name"] or dataset["id"])]
    splits = [f"{count:,} {split}" for split, count in summary["splits"].items() if count]
    sides = [
        f"{low} to {high}" if low != high else str(low)
        for low, high in (summary["width_px"], summary["height_px"])
    ]
    counts = summary["class_counts"].get("train") or {}
    spread = None
    if counts:
        least, most = (f(counts, key=lambda name: counts[name]) for f in (min, max))
        spread = f"{counts[least]:,}"
        if counts[most] > counts[least]:
            spread += f" ({least}) to {counts[most]:,} ({most})"
    return [
        ("Data set", dataset["name"]),
        ("Id", dataset["id"]),
        ("Images", f"{summary['num_images']:,}: {', '.join(splits)}"),
        ("Classes", _classes(summary["classes"])),
        ("Training images per class", spread),
        ("Size", f"{sides[0]} px wide, {sides[1]} px high"),
        (
            "Split",
            "given by the archive" if summary["split_origin"] == "given" else "made at upload",
        ),
    ]


def _classes(names: Sequence[str]) -> str:
    if not names:
        return "none: the images have no labels"
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return f"{len(names)}: {', '.join(names[:SHOWN_CLASSES])}{more}"


def _data_note(dataset: JsonObject) -> str:
    if dataset["deleted"]:
        return "The data set has been deleted; pictures of it below are kept with the job."
    return "" if dataset["summary"] else "The data set has not been read."


def _no_scores(report: JsonObject, running: bool) -> str:
    if running:
        return "Nothing has been scored yet."
    if report["job"]["status"] != "succeeded":
        return "The job ended before anything was scored."
    return "Nothing was scored: the data set has no held-out images, or no protocol fits it."


def _no_pictures(report: JsonObject, figures: FiguresFile | None, running: bool) -> str:
    if figures is not None:
        return (
            "Not there: it needs labelled held-out images of two or more classes, or was not asked"
            " for."
        )
    if running:
        return "Not there yet: it is made when the encoder is scored."
    return "Not there: the encoder was not scored on held-out images."


def _stages(
    series: Sequence[JsonObject], stays: Sequence[JsonObject]
) -> tuple[list[JsonObject], list[str]]:
    """Return the curves per stage in the order of the stages, and the names of those left out."""
    order = {stay["phase"]: place for place, stay in enumerate(stays)}
    drawable = [
        one
        for one in series
        if one["name"] not in HIDDEN_CURVES and any(value is not None for value in one["values"])
    ]
    drawable.sort(
        key=lambda one: (order.get(one["stage"], len(order)), one["stage"], _rank(one["name"]))
    )
    stages: dict[str, JsonObject] = {}
    left_out = []
    for one in drawable:
        empty: JsonObject = {"name": one["stage"], "curves": [], "engine": []}
        stage = stages.setdefault(one["stage"], empty)
        if len(stage["curves"]) + len(stage["engine"]) >= MAX_CURVES:
            left_out.append(f"{one['stage']} {one['name']}")
            continue
        stage["engine" if one["name"] in ENGINE_CURVES else "curves"].append(curve(one))
    return list(stages.values()), left_out


def _rank(name: str) -> tuple[int, str]:
    if name in ENGINE_CURVES:
        return len(FIRST_CURVES) + 1, name
    first = (place for place, part in enumerate(FIRST_CURVES) if part in name)
    return next(first, len(FIRST_CURVES)), name


def _model(model: JsonObject) -> list[tuple[str, Any]]:
    return [
        ("Id", model["id"]),
        ("Architecture", model["architecture"]),
        ("Vector length", model["embed_dim"]),
        ("Image size", model["image_size_px"] and f"{model['image_size_px']} px"),
        ("Download", size(model["size_bytes"])),
    ]


def _snippet(model: JsonObject, base_url: str) -> str:
    name = model["id"]
    return f"""curl -o {name}.zip {base_url}{model["download"]}
unzip -d {name} {name}.zip

import timm
encoder = timm.create_model("local-dir:{name}", pretrained=True).eval()
"""


def _reproduce(sources: Sources) -> list[tuple[str, Any]]:
    report = sources.report
    versions = ", ".join(f"{name} {version}" for name, version in sources.versions.items())
    return [
        ("Seed", report["config"].get("seed")),
        ("Data (sha256)", report["dataset"].get("archive_sha256")),
        ("Versions", versions),
    ]


def _citation(report: JsonObject) -> str:
    config = report["config"]
    method = config["method"]["name"]
    what = getattr(METHOD_CONFIGS.get(method), "DESCRIPTION", "")
    data = report["dataset"].get("archive_sha256")
    parts = [
        f"Tuned with ctune {__version__}, method {method}" + (f" ({what})" if what else ""),
        f"encoder {_encoder(config['encoder'])}",
        f"seed {config.get('seed')}",
        f"data sha256 {data[:12]}…" if data else "",
        f"job {report['job']['id']}",
    ]
    return ", ".join(part for part in parts if part) + "."
