"""A job with everything that a report shows, without a training."""

import base64
import io
import math
from typing import Any

from PIL import Image
from sqlalchemy import insert

from ctune.figures_file import (
    ClassAccuracy,
    ClassFigures,
    ConfusedPair,
    CosineHistograms,
    Diagnostic,
    Figures,
    FiguresFile,
    Neighbour,
    PictureTable,
    PlaneMap,
    Query,
)
from ctune.schema import JsonObject
from service.jobs import lifecycle
from service.jobs.lifecycle import Ending
from service.tables import JobEvent, Metric
from tests.service import rows
from tests.service.conftest import Api

HOSTILE = "<script>alert('x')</script>"
LONG = "Rhododendron-ferrugineum-var-leucocarpum-without-any-space-to-break-at"
CLASSES = ("oak", HOSTILE, LONG)
STEPS = 200


def add_reported_job(api: Api, *, images: int = 300) -> str:
    """Insert a job that has succeeded, with metrics, events, a model and figures."""
    with api.database.writing() as session:
        dataset = rows.add_ready_dataset(session, {"oak": 8, HOSTILE: 4, LONG: 90})
        dataset.name = HOSTILE
        config: JsonObject = {
            "encoder": rows.ENCODER, "method": rows.METHOD, "seed": 3, "note": HOSTILE,
        }  # fmt: skip
        metadata = {"team": HOSTILE, LONG[:64]: LONG}
        job = rows.add_job(
            session, dataset.id, name=f"{HOSTILE} {LONG}", config=config, metadata_=metadata
        ).id
        lease = rows.start(session)
        lifecycle.enter_phase(session, lease, "contrastive")
        session.execute(insert(Metric), list(_metrics(job)))
        session.execute(insert(JobEvent), _events(job))
        model = rows.add_model(session, api.storage, job).id
        values = {"model_id": model, "result": _result()}
        assert lifecycle.finish(session, lease, Ending("succeeded", values=values))
    run = api.storage.job_run(job, 1).create()
    run.figures.write_text(figures_file(images).model_dump_json(), encoding="utf-8")
    return job


def _metrics(job: str) -> Any:
    fixed = {"job_id": job, "attempt": 1, "created_at": 1.0, "stage": "contrastive"}
    for step in range(STEPS):
        values = {
            "loss": math.exp(-step / 50) if step != 20 else None,
            "lr": 1e-3 * (1 - step / STEPS),
            "online_knn_top1": min(1.0, step / 100),
            "grad_norm": 1.0,
        }
        for name, value in values.items():
            yield fixed | {"name": name, "step": step, "value": value}


def _events(job: str) -> list[JsonObject]:
    fixed = {"job_id": job, "attempt": 1, "created_at": 1.0, "level": "info", "message": ""}
    details = {"ctune": "0.1.0", "torch": "2.9"}
    warning = {"code": "collapse", "hint": f"lower the learning rate {HOSTILE}"}
    return [
        fixed | {"seq": 1, "kind": "started", "data": {"details": details}},
        fixed | {"seq": 2, "kind": "warning", "message": f"bad {HOSTILE}", "data": warning},
    ]


def _result() -> JsonObject:
    settings = {"k": 20, "temperature": 0.07}
    before = {"knn": {"top1": 0.25, "settings": settings}, "isotropy": {"gap": 0.1, "overlap": 0.5}}
    after = {"knn": {"top1": 0.75, "settings": settings}, "isotropy": {"gap": 0.4, "overlap": 0.75}}
    evaluation = {"before": before, "after": after}
    return {"evaluation": evaluation, "image_passes": 12_800, "train_s": 75.0, "model": {}}


def figures_file(images: int = 300) -> FiguresFile:
    """Return figures before and after with every kind of picture."""
    return FiguresFile(
        classes=dict(enumerate(CLASSES)),
        thumbnails={number: _thumbnail(number) for number in range(6)},
        before=figures(images),
        after=figures(images),
        tables=[
            PictureTable(
                title=f"reconstructions {HOSTILE}",
                text=LONG,
                columns=["image", HOSTILE, LONG],
                rows=[[_thumbnail(n)] * 3 for n in range(2)],
            )
        ],
    )


def figures(images: int) -> Figures:
    """Return one of each picture; classes are (number of the image) % 3."""
    points = [((37 * n) % 1001, (91 * n) % 1001) for n in range(images)]
    matrix = [[8, 2, 0], [1, 9, 0], [0, 5, 5]]
    classes = ClassFigures(
        num_images=30,
        matrix=matrix,
        pairs=[ConfusedPair(label=2, predicted=1, count=5, share=0.5)],
        accuracies=[
            ClassAccuracy(label=c, accuracy=matrix[c][c] / 10, num_images=10) for c in (2, 0, 1)
        ],
    )
    near = [Neighbour(image=n, label=n % 3, cosine=1 - n / 10) for n in range(1, 6)]
    labels = [n % 3 for n in range(images)]
    norms = Diagnostic(title="norms", text="per layer", labels=["first", LONG], y=[1.0, 2.0])
    queue = Diagnostic(title="queue", text="over time", x=[0, 0.5, 1], y=[0.0, 1.0, None])
    return Figures(
        cosines=CosineHistograms(
            intra=[0] * 40 + [1] * 10, inter=[0] * 30 + [2] * 20, intra_mean=0.8, inter_mean=0.6
        ),
        predictions={"knn": classes, "classifier": classes},
        maps=[PlaneMap(kind="pca", points=points, labels=labels, explained=0.5)],
        gallery=[Query(image=0, label=0, neighbours=near)],
        diagnostics={"norms": norms, "queue": queue},
    )


def _thumbnail(number: int) -> str:
    target = io.BytesIO()
    Image.new("RGB", (64, 48), (40 * number, 90, 120)).save(target, "WEBP")
    return base64.b64encode(target.getvalue()).decode("ascii")
