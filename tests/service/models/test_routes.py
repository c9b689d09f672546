"""Models over HTTP: list, look, download, delete."""

import io
import zipfile

import pytest

from ctune.client_archive import unpack_model
from service.tables import Job, new_id
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults, problem


def add(api: Api, job: str | None = None) -> str:
    with api.database.writing() as session:
        return rows.add_model(session, api.storage, job).id


def test_models_are_listed_newest_first(api: Api) -> None:
    ids = [add(api), add(api, "job_1")]
    found = api.client.get("/models").json()
    assert [item["id"] for item in found["data"]] == sorted(ids, reverse=True)
    of_job = api.client.get("/models", params={"job": "job_1"}).json()["data"]
    assert [item["id"] for item in of_job] == [ids[1]]
    shown = api.client.get(f"/models/{ids[1]}").json()
    assert shown == of_job[0] and shown["object"] == "model" and shown["created_at"] == 1
    assert (shown["architecture"], shown["embed_dim"]) == ("vit_tiny_patch16_224", 192)
    assert shown["job"] == "job_1" and shown["download"] == f"/models/{ids[1]}/download"


def test_a_download_is_the_model_directory(
    api: Api, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = add(api)
    for query in ({}, {"format": "timm"}):
        answer = api.client.get(f"/models/{model}/download", params=query)
        assert answer.headers["content-type"] == "application/zip"
        assert f'filename="{model}.zip"' in answer.headers["content-disposition"]
        content = io.BytesIO(answer.content)
        with zipfile.ZipFile(content) as archive:
            assert archive.testzip() is None
            assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_STORED}
        folder = tmp_path_factory.mktemp("pulled") / "model"
        unpack_model(content, folder)
        for path in api.storage.model(model).rglob("*"):
            if path.is_file():
                copy = folder / path.relative_to(api.storage.model(model))
                assert copy.read_bytes() == path.read_bytes()


def test_a_model_deleted_during_its_download_arrives_whole(sqlite_api: Api) -> None:
    model = add(sqlite_api)
    folder = sqlite_api.storage.model(model)
    (folder / "large.bin").write_bytes(bytes(20_000_000))
    with sqlite_api.client.stream("GET", f"/models/{model}/download") as answer:
        pieces = answer.iter_bytes()
        content = next(pieces)
        sqlite_api.storage.remove(folder)
        content += b"".join(pieces)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None and len(archive.read("large.bin")) == 20_000_000


def test_other_formats_are_refused(sqlite_api: Api) -> None:
    model = add(sqlite_api)
    path = f"/models/{model}/download"
    for wanted, code in (
        ("open_clip", "format_not_available"),
        ("onnx", "format_not_available"),
        ("keras", "invalid_choice"),
    ):
        found = faults(sqlite_api.client.get(path, params={"format": wanted}))
        assert found["/format"]["code"] == code and "timm" in found["/format"]["detail"]


def test_unknown_models_and_models_without_files(sqlite_api: Api) -> None:
    for id in ("mdl_nothing", "%00"):
        for path in ("", "/download"):
            said = problem(sqlite_api.client.get(f"/models/{id}{path}"), 404)["detail"]
            assert "GET /models" in said
        problem(sqlite_api.client.delete(f"/models/{id}"), 404)
    model = add(sqlite_api)
    sqlite_api.storage.remove(sqlite_api.storage.model(model))
    problem(sqlite_api.client.get(f"/models/{model}/download"), 404)


def test_deleting_removes_the_files(api: Api) -> None:
    model = add(api)
    answer = api.client.delete(f"/models/{model}")
    assert answer.json() == {"id": model, "object": "model", "deleted": True}
    assert not api.storage.model(model).exists()
    problem(api.client.get(f"/models/{model}"), 404)


def test_a_model_that_a_job_starts_from_is_not_deleted(api: Api) -> None:
    model, other = add(api), add(api)
    config = {"encoder": {"source": "model", "id": model}, "method": rows.METHOD}
    with api.database.writing() as session:
        job = rows.add_job(session, config=config).id
        session.add(
            Job(
                id=new_id("job"), status="succeeded", dataset_id="ds_x", metadata_={},
                created_at=1.0, config={"encoder": {"source": "model", "id": other}},
            )
        )  # fmt: skip
    said = problem(api.client.delete(f"/models/{model}"), 409)
    assert job in said["detail"] and said["error"]["code"] == "model_in_use"
    assert api.storage.model(model).exists()
    assert api.client.delete(f"/models/{other}").status_code == 200
    api.client.post(f"/jobs/{job}/cancel")
    assert api.client.delete(f"/models/{model}").status_code == 200
