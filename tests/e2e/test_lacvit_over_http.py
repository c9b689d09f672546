"""The whole path over HTTP: upload, LaCViT job, report, download, embed, classify, delete.

Once on the embedded set-up, once on Postgres and Redis.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctune.client import Client
from ctune.client_http import ConflictError, InvalidRequestError, NotFoundError, UnsuccessfulError
from tests.e2e.running import Running, clean_environment, until
from tests.squares import CLASSES, noisy_square, tiny_config, write_archive

pytestmark = pytest.mark.timeout(600)

NEW = 3
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with a given split, a junk file and one file that is no image."""
    others = {
        "__MACOSX/train/red/._0.png": b"junk",
        "train/red/broken.png": b"\x89PNG\r\n\x1a\nbroken",
    }
    path = tmp_path_factory.mktemp("archive") / "squares.zip"
    return write_archive(path, train_per_class=12, others=others)


def job_on(dataset: str, **changes: Any) -> dict[str, Any]:
    """Return the body of a job that takes seconds."""
    return tiny_config(dataset=dataset, name="squares", metadata={"team": "tests"}) | changes


def test_from_upload_to_vectors_and_away(service: Running, archive: Path, tmp_path: Path) -> None:
    with Client(service.url) as client:
        dataset = upload(client, archive)
        told = check_estimate(client, dataset)
        job = run_job(client, dataset)
        check_steps(client, job, told)
        model = job["result"]["model"]
        check_report(client, job)
        folder = client.models.pull(model, tmp_path / "model")
        images = [noisy_square(n % 3, np.random.default_rng(100 + n)) for n in range(NEW)]
        check_vectors(client, model, folder, images)
        check_classes(client, model, images)
        second = retune(client, dataset, model)
        check_comparison(client, job, second)
        for made in (second, job):
            client.models.delete(made["result"]["model"])
        with pytest.raises(NotFoundError):
            client.embed(second["result"]["model"], images)
        client.datasets.delete(dataset)
        for resource, id in ((client.datasets, dataset), (client.models, model)):
            assert id not in {found["id"] for found in resource.list()}
        assert client.jobs.get(job["id"])["status"] == "succeeded"
    until(lambda: not [*service.data_dir.glob("models/*")], 10)


def upload(client: Client, archive: Path) -> str:
    dataset = client.datasets.wait(client.datasets.push(archive)["id"])
    assert dataset["summary"]["splits"] == {"train": 36, "val": 0, "test": 18}
    assert dataset["summary"]["classes"] == list(CLASSES)
    assert (dataset["report"]["num_unreadable"], dataset["report"]["num_junk"]) == (1, 1)
    assert dataset["report"]["unreadable"][0]["path"] == "train/red/broken.png"
    return str(dataset["id"])


def check_estimate(client: Client, dataset: str) -> dict[str, Any]:
    """Ask what the job will take: first the worker measures it, then that is remembered."""
    told = client.jobs.estimate(job_on(dataset), wait_s=90)
    assert (told["reason"], told["error"]) == (None, None)
    amounts = [told["duration_s"], told["memory_bytes"], *told["disk_bytes"].values()]
    paces = [stage["images_per_s"] for stage in told["stages"]]
    for amount in [*amounts, *paces, told["measured"]["encode_images_per_s"]]:
        assert math.isfinite(amount) and amount > 0
    assert client.jobs.estimate(job_on(dataset, seed=99)) == told, "of no measurement of its own"
    return told


def check_steps(client: Client, job: dict[str, Any], told: dict[str, Any]) -> None:
    """Compare what the job did with what was estimated."""
    assert job["result"]["image_passes"] == told["image_passes"]
    stages = {e["data"]["stage"]: e["data"] for e in events_of(client, job, "stage")}
    for stage in told["stages"]:
        assert stages[stage["name"]]["total_steps"] == stage["total_steps"]


def events_of(client: Client, job: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    events = client.http.data_of(f"/jobs/{job['id']}/events", {"limit": 100})
    return [event for event in events if event["type"] == kind]


def run_job(client: Client, dataset: str) -> dict[str, Any]:
    with pytest.raises(InvalidRequestError) as caught:
        bad = job_on(dataset, seed=-1, method={"name": "lacvit", "contrastive": {"lr": "fast"}})
        client.jobs.create(bad)
    assert {f.pointer for f in caught.value.faults} == {"/seed", "/method/contrastive/lr"}
    created = client.jobs.create(job_on(dataset))
    assert created["config"]["method"]["contrastive"]["warmup_epochs"] == 0  # `auto`, resolved
    events = list(client.jobs.watch(created["id"]))
    kinds = [event.kind for event in events]
    assert kinds[-1] == "done"
    assert {"started", "stage", "evaluation", "checkpoint", "finished"} <= set(kinds)
    stages = [event.data["data"]["stage"] for event in events if event.kind == "stage"]
    main = [stage for stage in stages if stage not in ("caching", "evaluating")]
    assert main == ["contrastive", "probe", "exporting"]
    job = client.jobs.wait(created["id"])
    assert events[-1].data["model"] == job["result"]["model"]
    assert job["metadata"] == {"team": "tests"}
    log = client.jobs.logs(job["id"])
    assert "stage contrastive starts" in log and "encoder scored after tuning" in log
    with pytest.raises(ConflictError):
        client.jobs.cancel(job["id"])
    return job


def check_report(client: Client, job: dict[str, Any]) -> None:
    report = client.jobs.report(job["id"])
    rows = {(row["protocol"], row["metric"]): row for row in report["comparison"]}
    for protocol in ("knn", "linear_probe"):
        row = rows[protocol, "top1"]
        assert 0 <= row["before"] <= 1
        assert 0 <= row["after"] <= 1
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
    names = {series["name"] for series in client.jobs.metrics(job["id"])["series"]}
    assert {"loss", "lr", "train_top1"} <= names
    assert {w["data"]["code"] for w in report["warnings"]} >= {"encoder_from_scratch"}
    page = client.jobs.report_page(job["id"])
    for said in ("confusion matrix, After: the model&#39;s classifier", "After: PCA", "last "):
        assert said in page
    assert page.count("data:image/webp;base64,") > 50, "neighbours before and after"


def check_comparison(client: Client, *jobs: dict[str, Any]) -> None:
    found = client.jobs.compare([job["id"] for job in jobs])
    assert [job["method"] for job in found["jobs"]] == ["lacvit", "linear_probe"]
    assert found["comparable"] and not found["groups"]
    rows = {(row["protocol"], row["metric"]): row["values"] for row in found["scores"]}
    expected = [job["result"]["evaluation"]["after"]["knn"]["top1"] for job in jobs]
    assert [value["after"] for value in rows["knn", "top1"]] == expected
    with pytest.raises(NotFoundError, match="job_none"):
        client.jobs.compare([jobs[0]["id"], "job_none"])


def check_vectors(client: Client, model: str, folder: Path, images: list[bytes]) -> None:
    """Compare with plain timm, in a process that knows nothing of ctune's code."""
    served = client.embed(model, images)
    paths = []
    for number, image in enumerate(images):
        paths.append(folder.parent / f"{number}.png")
        paths[-1].write_bytes(image)
    script = Path(__file__).with_name("plain_timm.py")
    out = folder.parent / "plain.npy"
    subprocess.run(
        [sys.executable, "-I", script, folder, out, *paths], check=True, env=clean_environment()
    )
    np.testing.assert_allclose(np.load(out), served, atol=TOLERANCE, rtol=0)
    lengths = np.linalg.norm(client.embed(model, images, normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=TOLERANCE)
    broken = [images[0], b"no image", images[1]]
    with pytest.raises(InvalidRequestError) as caught:
        client.embed(model, broken)
    assert [fault.pointer for fault in caught.value.faults] == ["/input/1"]


def check_classes(client: Client, model: str, images: list[bytes]) -> None:
    found = client.classify(model, images)
    assert len(found) == len(images)
    for item in found:
        assert {p["label"] for p in item["predictions"]} <= set(CLASSES)
        assert sum(p["probability"] for p in item["predictions"]) == pytest.approx(1, abs=1e-5)


def retune(client: Client, dataset: str, model: str) -> dict[str, Any]:
    """Start a second job from the first one's model, with another method."""
    encoder = {"source": "model", "id": model}
    probe = {"name": "linear_probe", "probe": {"epochs": 2}}
    created = client.jobs.create(job_on(dataset, encoder=encoder, method=probe))
    return client.jobs.wait(created["id"])


def test_failures_are_told(service: Running, tmp_path: Path) -> None:
    with Client(service.url) as client:
        bad = tmp_path / "bad.zip"
        bad.write_bytes(b"this is no archive")
        made = client.datasets.push(bad)
        with pytest.raises(UnsuccessfulError) as caught:
            client.datasets.wait(made["id"])
        assert caught.value.error_code == "not_an_archive"
        assert "zip, tar, tar.gz or tar.zst" in str(caught.value)
        with pytest.raises(InvalidRequestError) as refused:
            client.jobs.create(job_on(made["id"]))
        assert refused.value.faults[0].code == "dataset_failed"


@pytest.mark.slow
@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_command_line_client(service: Running, archive: Path, tmp_path: Path) -> None:
    def ctune(*arguments: str | Path) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments, "--json"],
            env=clean_environment() | {"CTUNE_URL": service.url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError:
            return [json.loads(line) for line in lines]

    dataset = ctune("datasets", "push", archive)
    assert dataset["status"] == "ready"
    assert ctune("datasets", "list")[0]["id"] == dataset["id"]
    body = tmp_path / "job.json"
    body.write_text(json.dumps(job_on("ds_other")))
    estimate = ctune("jobs", "estimate", body, "--dataset", dataset["id"])
    assert estimate["duration_s"] > 0
    told = ctune("jobs", "create", body, "--dataset", dataset["id"], "--watch")
    assert told[-1]["event"] == "done"
    job = ctune("jobs", "show", told[0]["id"])
    model = job["result"]["model"]
    assert ctune("models", "list")[0]["id"] == model
    pulled = ctune("models", "pull", model, tmp_path / "pulled")
    image = Path(pulled["path"]) / "reference" / "000.png"
    vector = ctune("embed", model, image)
    assert len(vector["embedding"]) == 24
    for group, id in (("datasets", dataset["id"]), ("jobs", job["id"]), ("models", model)):
        assert ctune(group, "show", id)["id"] == id
