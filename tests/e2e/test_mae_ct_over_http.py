"""MAE and MAE-CT over HTTP, a job per stage and all stages in one: the same encoder.

Once on the embedded set-up, once on Postgres and Redis.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctune.client import Client
from ctune.client_http import InvalidRequestError
from ctune.schema import JsonObject
from tests.e2e.running import Running
from tests.e2e.test_lacvit_over_http import check_vectors
from tests.squares import noisy_square, tiny_config, write_archive

pytestmark = pytest.mark.timeout(600)

HEAD_FILE = "nnclr_head.safetensors"


def job_on(dataset: str, method: str, model: str | None = None, **changes: Any) -> JsonObject:
    """Return the body of a job that takes seconds, from scratch or from a model."""
    body = tiny_config(method, dataset=dataset, evaluation={"protocols": ["knn"], "knn_k": 5})
    body["method"] |= changes
    if model is not None:
        body["encoder"] = {"source": "model", "id": model}
    return body


def run_job(client: Client, body: JsonObject) -> JsonObject:
    return client.jobs.wait(client.jobs.create(body)["id"])


def test_a_job_per_stage_and_one_for_all(service: Running, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "squares.zip")
    with Client(service.url) as client:
        dataset = str(client.datasets.wait(client.datasets.push(archive)["id"])["id"])
        shared = tiny_config("mae_ct")["method"]["mae"]
        first = run_job(client, job_on(dataset, "mae", pool="mean", mae=shared))
        encoder = first["result"]["model"]
        check_refusal(client, dataset, encoder)
        second = run_job(client, job_on(dataset, "mae_ct", encoder, stages=["head_init"]))
        head = second["result"]["model"]
        last = ["contrastive_tuning"]
        third = run_job(client, job_on(dataset, "mae_ct", head, stages=last, head={}))
        assert third["config"]["method"]["head"]["out_dim"] == 16, "as it was trained"
        whole = run_job(client, job_on(dataset, "mae_ct"))
        compare_models(client, third, whole, tmp_path)
        images = [noisy_square(n, np.random.default_rng(n)) for n in range(3)]
        check_vectors(client, whole["result"]["model"], tmp_path / "whole", images)
        check_report(client, whole)


def check_refusal(client: Client, dataset: str, encoder: str) -> None:
    """All faults of a request at once: no head to go on with, too few images for a batch."""
    body = job_on(dataset, "mae_ct", encoder, stages=["contrastive_tuning"], batch_size=60)
    with pytest.raises(InvalidRequestError) as caught:
        client.jobs.create(body)
    assert {(fault.pointer, fault.code) for fault in caught.value.faults} == {
        ("/method/stages", "head_missing"),
        ("/method/batch_size", "batch_larger_than_data"),
    }


def compare_models(client: Client, last: JsonObject, whole: JsonObject, folder: Path) -> None:
    pulled = [
        client.models.pull(job["result"]["model"], folder / name)
        for name, job in (("last", last), ("whole", whole))
    ]
    for file in ("model.safetensors", HEAD_FILE):
        one, other = (load_file(path / file) for path in pulled)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def check_report(client: Client, job: JsonObject) -> None:
    report = client.jobs.report(job["id"])
    protocols = {row["protocol"] for row in report["comparison"]}
    assert {"knn", "nnclr_head"} <= protocols
    series = client.jobs.metrics(job["id"])["series"]
    stages = {found["stage"] for found in series if found["name"] == "loss"}
    assert stages == {"mae", "head_init", "contrastive_tuning"}
    assert {"nn_accuracy", "drawn_share"} <= {found["name"] for found in series}
    page = client.jobs.report_page(job["id"])
    assert "contrastive_tuning" in page and "head_init" in page
