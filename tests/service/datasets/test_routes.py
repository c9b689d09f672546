"""Data sets over HTTP: list, look, images, delete."""

import io
from typing import Any

import pytest
from PIL import Image

from service.datasets import images
from service.errors import InvalidError
from service.jobs import lifecycle
from service.tables import Dataset
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults, problem

COUNTS = {"oak": 3, "pine": 4}


def ready(api: Api, key: str = "key") -> str:
    store = rows.write_store(api.storage, key, COUNTS)
    with api.database.writing() as session:
        return rows.add_ready_dataset(session, COUNTS, store=store).id


def test_the_states_of_a_data_set(api: Api) -> None:
    with api.database.writing() as session:
        failed = rows.fail_dataset(session).id
        done = rows.add_ready_dataset(session).id
        waiting = rows.add_dataset(session).id
    found = api.client.get("/datasets").json()
    assert {item["id"]: item["status"] for item in found["data"]} == {
        failed: "failed",
        done: "ready",
        waiting: "processing",
    }
    assert api.client.get(f"/datasets/{failed}").json()["error"]["code"] == "invalid_archive"
    shown = api.client.get(f"/datasets/{done}").json()
    assert shown["summary"]["class_counts"]["train"] == {"oak": 8, "pine": 8}
    assert shown["report"]["layout"] == "class_folders" and shown["error"] is None
    said = problem(api.client.get(f"/datasets/{waiting}/images"), 409)
    assert f"GET /datasets/{waiting}" in said["detail"]


def test_lists_are_paged(api: Api) -> None:
    with api.database.writing() as session:
        ids = [rows.add_dataset(session).id for _ in range(5)]
    first = api.client.get("/datasets", params={"limit": 3}).json()
    second = api.client.get("/datasets", params={"limit": 3, "after": first["last_id"]}).json()
    assert [item["id"] for item in first["data"] + second["data"]] == sorted(ids, reverse=True)
    assert first["has_more"] and not second["has_more"]


def test_images_by_split_and_label(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "RECORDS_PER_LOOK", 2)
    dataset = ready(sqlite_api)

    def numbers(**query: Any) -> list[int]:
        found: list[int] = []
        while True:
            page = sqlite_api.client.get(f"/datasets/{dataset}/images", params=query).json()
            found += [image["id"] for image in page["data"]]
            if not page["has_more"]:
                return found
            query["after"] = page["last_id"]

    assert numbers() == list(range(11))
    assert numbers(limit=2) == list(range(11))
    assert numbers(split="train") == [0, 1, 2, 5, 6, 7, 8]
    assert numbers(split="test", limit=1) == [3, 4, 9, 10]
    assert numbers(split="val") == []
    assert numbers(label="pine") == [5, 6, 7, 8, 9, 10]
    assert numbers(label="pine", split="test", limit=1) == [9, 10]
    assert numbers(after=8) == [9, 10] and numbers(after=10**12) == []
    first = sqlite_api.client.get(f"/datasets/{dataset}/images").json()["data"][0]
    assert first == {
        "id": 0,
        "object": "dataset.image",
        "path": "oak/0.png",
        "sha256": "00",
        "split": "train",
        "label": "oak",
        "width_px": 32,
        "height_px": 24,
        "thumbnail": f"/datasets/{dataset}/images/0/thumbnail",
    }


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"split": "training"}, "/split"),
        ({"label": "fir"}, "/label"),
        ({"after": -2}, "/after"),
        ({"limit": 1000}, "/limit"),
    ],
)
def test_wrong_queries(sqlite_api: Api, query: dict[str, Any], pointer: str) -> None:
    dataset = ready(sqlite_api)
    answer = sqlite_api.client.get(f"/datasets/{dataset}/images", params=query)
    assert set(faults(answer)) == {pointer}
    if pointer == "/label":
        assert "oak, pine" in answer.json()["detail"]


def test_thumbnails_are_made_anew(sqlite_api: Api) -> None:
    dataset = ready(sqlite_api)
    answer = sqlite_api.client.get(f"/datasets/{dataset}/images/5/thumbnail")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in answer.headers["cache-control"]
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (40, 24), "RGB")
    missing = sqlite_api.client.get(f"/datasets/{dataset}/images/11/thumbnail")
    assert "it has 11" in problem(missing, 404)["detail"]
    wrong = sqlite_api.client.get(f"/datasets/{dataset}/images/-1/thumbnail")
    assert set(faults(wrong)) == {"/number"}


def test_thumbnails_of_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS_IN_MEMORY", 1000)
    target = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (2000, 1000), (200, 30, 40)).save(target, "JPEG", exif=exif)
    made = images._decoded(target.getvalue(), 2_000_000)
    assert made.height == 2 * made.width and made.height <= 1000
    with pytest.raises(InvalidError, match="too many"):
        images._decoded(rows.png((40, 40), 3), 1600)


def test_a_store_whose_files_are_gone(sqlite_api: Api) -> None:
    dataset = ready(sqlite_api)
    sqlite_api.storage.remove(sqlite_api.storage.store("key"))
    answer = sqlite_api.client.get(f"/datasets/{dataset}/images")
    assert "cannot be read" in problem(answer, 503)["detail"]


def test_deleting_removes_the_files(api: Api) -> None:
    dataset = ready(api)
    run = api.storage.ingest_run(dataset, 1).create().root
    api.storage.upload(dataset).write_bytes(b"x")
    answer = api.client.delete(f"/datasets/{dataset}")
    assert answer.json() == {"id": dataset, "object": "dataset", "deleted": True}
    problem(api.client.get(f"/datasets/{dataset}"), 404)
    problem(api.client.delete(f"/datasets/{dataset}"), 404)
    assert not api.storage.store("key").exists() and not run.parent.exists()
    assert not api.storage.upload(dataset).exists()


def test_a_shared_store_stays_until_its_last_data_set_goes(api: Api) -> None:
    store = rows.write_store(api.storage, "key", COUNTS)
    with api.database.writing() as session:
        one = rows.add_ready_dataset(session, COUNTS, store=store).id
        two = rows.add_ready_dataset(session, COUNTS, store=store).id
    assert api.client.delete(f"/datasets/{one}").status_code == 200
    assert api.client.get(f"/datasets/{two}/images").status_code == 200
    assert api.client.delete(f"/datasets/{two}").status_code == 200
    assert not api.storage.store("key").exists()


def test_a_store_that_an_ingestion_may_take_over_stays(api: Api) -> None:
    dataset = ready(api)
    with api.database.writing() as session:
        rows.add_dataset(session)  # the same archive, still waiting
    assert api.client.delete(f"/datasets/{dataset}").status_code == 200
    assert api.storage.store("key").exists()


def test_a_data_set_in_use_is_not_deleted(api: Api) -> None:
    dataset = ready(api)
    job = api.client.post("/jobs", json=rows.job_body(dataset, method={"name": "linear_probe"}))
    said = problem(api.client.delete(f"/datasets/{dataset}"), 409)
    assert job.json()["id"] in said["detail"] and said["error"]["code"] == "dataset_in_use"
    api.client.post(f"/jobs/{job.json()['id']}/cancel")
    assert api.client.delete(f"/datasets/{dataset}").status_code == 200
    assert api.client.get(job.headers["location"]).json()["dataset"] == dataset


def test_a_data_set_that_is_being_read_is_not_deleted(api: Api) -> None:
    with api.database.writing() as session:
        dataset = rows.add_dataset(session).id
        session.flush()
        assert lifecycle.claim(session, Dataset, owner="w", lease_s=9.0, gpus=(0, 0))
    said = problem(api.client.delete(f"/datasets/{dataset}"), 409)
    assert "being read" in said["detail"]
