"""POST /jobs: what is stored and returned, and every way to get it wrong."""

import json
from typing import Any

import pytest

from service.tables import Job
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults, problem


def ready(api: Api, **counts: int) -> str:
    with api.database.writing() as session:
        return rows.add_ready_dataset(session, counts or None).id


def test_a_job_is_stored_resolved_and_returned(api: Api) -> None:
    dataset = ready(api)
    body = rows.job_body(dataset, name="leaves", metadata={"team": "botany"}, priority=3, seed=7)
    answer = api.client.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["object"] == "job" and job["status"] == "queued" and job["id"].startswith("job_")
    assert job["queue"] == {"position": 1, "jobs_ahead": 0}
    assert (job["dataset"], job["name"], job["priority"]) == (dataset, "leaves", 3)
    assert job["metadata"] == {"team": "botany"} and job["config"]["seed"] == 7
    assert job["config"]["method"]["contrastive"]["layer_decay"] == 1.0  # was auto
    assert job["config"]["method"]["contrastive"]["temperature"] == 0.1
    assert isinstance(job["created_at"], int)
    assert [stay["status"] for stay in job["transitions"]] == ["queued"]
    assert api.client.get(f"/jobs/{job['id']}").json() == job


def test_the_place_in_the_queue_follows_priority_and_age(api: Api) -> None:
    dataset = ready(api)
    ids = [
        api.client.post("/jobs", json=rows.job_body(dataset, priority=p)).json()["id"]
        for p in (0, 0, 5)
    ]
    ahead = [api.client.get(f"/jobs/{id}").json()["queue"]["jobs_ahead"] for id in ids]
    assert ahead == [1, 2, 0]


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown field", {"nmae": "x"}, "/nmae", "unknown_field"),
    (
        "negative temperature",
        {"method": {"name": "lacvit", "contrastive": {"temperature": -1}}},
        "/method/contrastive/temperature",
        "out_of_range",
    ),
    ("unknown method", {"method": {"name": "lacvitt"}}, "/method/name", "invalid_choice"),
    ("no method name", {"method": {}}, "/method/name", "missing"),
    (
        "unknown encoder",
        {"encoder": {"source": "timm", "name": "vit_tinny_patch16_224"}},
        "/encoder/name",
        "unknown_encoder",
    ),
    (
        "size no multiple of the patch",
        {"encoder": {**rows.ENCODER, "image_size_px": 33}},
        "/encoder/image_size_px",
        "size_not_multiple_of_patch",
    ),
    (
        "option with a place of its own",
        {"encoder": {**rows.ENCODER, "options": {"patch_size": 8, "num_classes": 10}}},
        "/encoder/options/num_classes",
        "unknown_option",
    ),
    (
        "option of the loader",
        {"encoder": {**rows.ENCODER, "options": {"patch_size": 8, "checkpoint_path": "x"}}},
        "/encoder/options/checkpoint_path",
        "unknown_option",
    ),
    ("too many GPUs", {"resources": {"gpus": 65}}, "/resources/gpus", "out_of_range"),
    (
        "unknown model",
        {"encoder": {"source": "model", "id": "mdl_x"}},
        "/encoder/id",
        "unknown_model",
    ),
    ("unknown data set", {"dataset": "ds_nothing"}, "/dataset", "unknown_dataset"),
    ("wrong type", {"seed": "seven"}, "/seed", "invalid_type"),
    ("too many keys", {"metadata": {str(n): "" for n in range(17)}}, "/metadata", "out_of_range"),
    ("long value", {"metadata": {"a": "x" * 513}}, "/metadata/a", "out_of_range"),
    ("long key", {"metadata": {"k" * 65: ""}}, "/metadata/" + "k" * 65, "out_of_range"),
    ("slash in key", {"metadata": {"a/b": 3}}, "/metadata/a~1b", "invalid_type"),
    ("priority", {"priority": 101}, "/priority", "out_of_range"),
    ("long name", {"name": "x" * 257}, "/name", "out_of_range"),
    ("NUL", {"name": "a\0b"}, "/name", "not_storable"),
    (
        "protocol",
        {"evaluation": {"protocols": ["kn"]}},
        "/evaluation/protocols/0",
        "invalid_choice",
    ),
    (
        "batch larger than the data",
        {"method": {"name": "lacvit", "contrastive": {"batch_size": 512}}},
        "/method/contrastive/batch_size",
        "batch_larger_than_data",
    ),
    (
        "fields that do not fit together",
        {"method": {"name": "lacvit", "contrastive": {"warmup_epochs": 9, "epochs": 9}}},
        "/method/contrastive",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(
    ("changes", "pointer", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_fault_has_a_pointer_and_a_code(
    sqlite_api: Api, changes: dict[str, Any], pointer: str, code: str
) -> None:
    body = rows.job_body(ready(sqlite_api), **changes)
    found = faults(sqlite_api.client.post("/jobs", json=body))
    assert {place: fault["code"] for place, fault in found.items()} == {pointer: code}
    with sqlite_api.database.reading() as session:
        assert session.query(Job).count() == 0


def test_what_postgres_cannot_store_is_a_fault(api: Api) -> None:
    body = rows.job_body(ready(api), metadata={"a": "\ud800", "b\0": "x"})
    body["encoder"] = {**rows.ENCODER, "options": {"depth": float("nan"), "x": ["\0"]}}
    answer = api.client.post(
        "/jobs", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    found = faults(answer)
    assert set(found) >= {"/metadata/a", "/encoder/options/depth", "/encoder/options/x/0"}
    assert {found[p]["code"] for p in ("/encoder/options/depth",)} == {"not_storable"}


def test_all_faults_are_answered_at_once(api: Api) -> None:
    body = rows.job_body("ds_nothing", nmae="x")
    body["encoder"] = {"source": "timm", "name": "vit_tinny_patch16_224"}
    body["method"] = {"name": "lacvit", "contrastive": {"temperature": -1, "layer_decay": "most"}}
    answer = api.client.post("/jobs", json=body)
    found = faults(answer)
    assert set(found) == {
        "/nmae",
        "/method/contrastive/temperature",
        "/method/contrastive/layer_decay",
        "/dataset",
        "/encoder/name",
    }
    assert "-1" in found["/method/contrastive/temperature"]["detail"]
    assert "greater than 0" in found["/method/contrastive/temperature"]["detail"]
    assert "number or be 'auto'" in found["/method/contrastive/layer_decay"]["detail"]
    assert "vit_tiny_patch16_224" in found["/encoder/name"]["detail"]
    assert "GET /datasets" in found["/dataset"]["detail"]
    assert answer.json()["detail"].startswith("5 faults: ")
    assert answer.json()["error"]["param"] is not None


def test_a_data_set_that_is_not_ready_is_a_fault(api: Api) -> None:
    with api.database.writing() as session:
        failed = rows.fail_dataset(session).id
        waiting = rows.add_dataset(session).id
    found = faults(api.client.post("/jobs", json=rows.job_body(waiting)))["/dataset"]
    assert found["code"] == "dataset_not_ready" and f"GET /datasets/{waiting}" in found["detail"]
    found = faults(api.client.post("/jobs", json=rows.job_body(failed)))["/dataset"]
    assert found["code"] == "dataset_failed" and "holds no image" in found["detail"]


def test_one_class_only_is_a_fault(api: Api) -> None:
    found = faults(api.client.post("/jobs", json=rows.job_body(ready(api, oak=8))))
    assert found["/method/name"]["code"] == "labels_needed"
    assert "'oak'" in found["/method/name"]["detail"]


def test_a_model_can_be_the_encoder(api: Api) -> None:
    with api.database.writing() as session:
        model = rows.add_model(session, api.storage).id
    encoder: dict[str, Any] = {"source": "model", "id": model}
    dataset = ready(api)
    answer = api.client.post("/jobs", json=rows.job_body(dataset, encoder=encoder))
    assert answer.status_code == 201, answer.text
    encoder["image_size_px"] = 44
    found = faults(api.client.post("/jobs", json=rows.job_body(dataset, encoder=encoder)))
    assert found["/encoder/image_size_px"]["code"] == "size_not_multiple_of_patch"


def test_weights_that_forbid_commercial_use_need_the_operators_consent(sqlite_api: Api) -> None:
    api, dataset = sqlite_api, ready(sqlite_api)
    with api.database.writing() as session:
        model = rows.add_model(session, api.storage)
        model.info = {**model.info, "licence": "cc-by-nc-4.0"}
        tuned = {"source": "model", "id": model.id}
    names = ["vit_base_patch16_224.mae", "hiera_tiny_224"]
    wanted = [{"source": "timm", "name": name} for name in names] + [tuned]
    bodies = [rows.job_body(dataset, encoder=encoder) for encoder in wanted]
    for body in bodies:
        for url in ("/jobs", "/jobs/estimate"):
            (fault,) = faults(api.client.post(url, json=body)).values()
            assert fault["code"] == "noncommercial_weights"
            assert "cc-by-nc-4.0" in fault["detail"]
    free = [
        {"source": "timm", "name": names[0], "pretrained": False},
        {"source": "timm", "name": names[0].removesuffix(".mae")},
    ]
    for encoder in free:
        assert_created(api, rows.job_body(dataset, encoder=encoder))
    consenting = api.settings.model_copy(update={"allow_noncommercial_weights": True})
    before, api.app.state.settings = api.app.state.settings, consenting
    try:
        for body in bodies:
            assert_created(api, body)
    finally:
        api.app.state.settings = before


def assert_created(api: Api, body: dict[str, Any]) -> None:
    answer = api.client.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("body", ["{", "", '{"a": 1e5', "[1]", "3", "null", '"x"', "{'a': 1}"])
def test_wrong_json(sqlite_api: Api, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = sqlite_api.client.post("/jobs", content=body, headers=headers)
    assert "JSON" in problem(answer, 422)["detail"] or "missing" in answer.json()["detail"]


def test_bodies_that_no_parser_likes(sqlite_api: Api) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"[" * 200_000, b"9" * 5_000, b'{"a": "\xff"}'):
        answer = sqlite_api.client.post("/jobs", content=body, headers=headers)
        problem(answer, 400 if answer.status_code == 400 else 422)


def test_a_body_that_is_not_sent_as_json(sqlite_api: Api) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = sqlite_api.client.post("/jobs", content=b"{}", headers={"content-type": kind})
        assert "application/json" in problem(answer, 415)["detail"]


def test_the_body_is_described(sqlite_api: Api) -> None:
    described = sqlite_api.client.get("/openapi.json").json()
    schema = described["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]
    name = schema["schema"]["$ref"].rsplit("/", 1)[-1]
    assert name == "JobCreate"
    method = described["components"]["schemas"][name]["properties"]["method"]
    assert method["discriminator"]["propertyName"] == "name"
