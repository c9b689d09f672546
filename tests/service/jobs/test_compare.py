"""GET /jobs/compare."""

from typing import Any

import pytest

from ctune.schema import JsonObject
from service.jobs import lifecycle
from service.jobs.lifecycle import Ending
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults, problem

EVALUATION: JsonObject = {"protocols": ["knn"], "before": True, "knn_k": 20}


def scored_job(api: Api, dataset: str, *, top1: float, seed: int = 0, **config: Any) -> str:
    """Insert a job that has succeeded with a k-NN accuracy; before tuning it was 0.25."""
    resolved = {"encoder": rows.ENCODER, "method": rows.METHOD, "evaluation": EVALUATION}
    with api.database.writing() as session:
        job = rows.add_job(session, dataset, config=resolved | {"seed": seed} | config).id
        lease = rows.start(session)
        scores = {"before": {"knn": {"top1": 0.25}}, "after": {"knn": {"top1": top1}}}
        result = {"evaluation": scores, "image_passes": 640, "train_s": 2.5, "model": {}}
        assert lifecycle.finish(session, lease, Ending("succeeded", values={"result": result}))
    return job


def ready_dataset(api: Api, store: str = "stores/x") -> str:
    with api.database.writing() as session:
        return rows.add_ready_dataset(session, store=store).id


def compare(api: Api, *ids: str) -> Any:
    return api.client.get("/jobs/compare", params={"ids": list(ids)})


def test_one_table_over_jobs(api: Api) -> None:
    dataset = ready_dataset(api)
    first, second = scored_job(api, dataset, top1=0.5), scored_job(api, dataset, top1=0.75, seed=1)
    found = compare(api, second, first).json()
    assert found["object"] == "jobs.comparison" and found["comparable"] and not found["warnings"]
    assert [job["id"] for job in found["jobs"]] == [second, first]
    shown = found["jobs"][0]
    assert (shown["method"], shown["encoder"], shown["seed"]) == (
        "lacvit", "vit_tiny_patch16_224", 1,
    )  # fmt: skip
    assert (shown["dataset"], shown["dataset_name"]) == (dataset, "leaves")
    assert (shown["train_s"], shown["image_passes"]) == (2.5, 640)
    assert shown["report"] == f"/jobs/{second}/report"
    values = [{"before": 0.25, "after": 0.75}, {"before": 0.25, "after": 0.5}]
    assert found["scores"] == [{"protocol": "knn", "metric": "top1", "values": values}]


def test_jobs_that_differ_in_their_seed_alone_are_one_group(sqlite_api: Api) -> None:
    dataset = ready_dataset(sqlite_api)
    accuracies = (0.5, 0.6, 0.7)
    same = [
        scored_job(sqlite_api, dataset, top1=value, seed=seed, resources={"gpus": seed})
        for seed, value in enumerate(accuracies)
    ]
    other = scored_job(sqlite_api, dataset, top1=0.1, method=rows.METHOD | {"preset": "paper"})
    found = compare(sqlite_api, other, *same).json()
    assert len(found["groups"]) == 1 and found["comparable"]
    group = found["groups"][0]
    assert (group["jobs"], group["seeds"]) == (same, [0, 1, 2])
    spread = group["scores"][0]
    assert spread["after_mean"] == pytest.approx(0.6)
    assert spread["after_std"] == pytest.approx(0.1)
    assert (spread["before_mean"], spread["before_std"], spread["num_seeds"]) == (0.25, 0, 3)


def test_a_job_without_scores_is_named(sqlite_api: Api) -> None:
    dataset = ready_dataset(sqlite_api)
    scored = scored_job(sqlite_api, dataset, top1=0.5)
    config = {"encoder": rows.ENCODER, "method": rows.METHOD, "evaluation": EVALUATION, "seed": 9}
    with sqlite_api.database.writing() as session:
        queued = rows.add_job(session, dataset, config=config).id
    found = compare(sqlite_api, scored, queued).json()
    assert [(w["code"], w["jobs"]) for w in found["warnings"]] == [("not_finished", [queued])]
    assert found["scores"][0]["values"][1] == {"before": None, "after": None}
    spread = found["groups"][0]["scores"][0]
    assert (spread["after_mean"], spread["after_std"], spread["num_seeds"]) == (0.5, None, 1)


def test_other_data_and_other_settings_are_said(sqlite_api: Api) -> None:
    first = scored_job(sqlite_api, ready_dataset(sqlite_api, "stores/x"), top1=0.5)
    elsewhere = scored_job(sqlite_api, ready_dataset(sqlite_api, "stores/y"), top1=0.5)
    found = compare(sqlite_api, first, elsewhere).json()
    assert [warning["code"] for warning in found["warnings"]] == ["different_data"]
    assert not found["comparable"] and not found["groups"]
    again = scored_job(sqlite_api, ready_dataset(sqlite_api, "stores/x"), top1=0.5)
    assert compare(sqlite_api, first, again).json()["comparable"], "the bytes are the same"
    wider = EVALUATION | {"knn_k": 50}
    other = scored_job(sqlite_api, ready_dataset(sqlite_api), top1=0.5, evaluation=wider)
    codes = [warning["code"] for warning in compare(sqlite_api, first, other).json()["warnings"]]
    assert codes == ["different_evaluation"]
    more = EVALUATION | {"protocols": ["knn", "isotropy"], "map": "umap"}
    other = scored_job(sqlite_api, ready_dataset(sqlite_api), top1=0.5, evaluation=more)
    assert compare(sqlite_api, first, other).json()["comparable"]


def test_ids_may_repeat_and_stand_between_commas(sqlite_api: Api) -> None:
    dataset = ready_dataset(sqlite_api)
    ids = [scored_job(sqlite_api, dataset, top1=0.5) for _ in range(3)]
    found = compare(sqlite_api, f"{ids[0]}, {ids[1]},", ids[2], ids[0]).json()
    assert [job["id"] for job in found["jobs"]] == ids


@pytest.mark.parametrize("count", [0, 1, 51])
def test_the_number_of_jobs_is_limited(sqlite_api: Api, count: int) -> None:
    answer = compare(sqlite_api, ",".join(f"job_{n}" for n in range(count)))
    assert (
        set(faults(answer)) == {"/ids"} and f"{count} different" in problem(answer, 422)["detail"]
    )


def test_all_unknown_jobs_are_named_at_once(sqlite_api: Api) -> None:
    known = scored_job(sqlite_api, ready_dataset(sqlite_api), top1=0.5)
    found = problem(compare(sqlite_api, "job_1", known, "job_\0"), 404)
    assert "job_1" in found["detail"] and len(found["errors"]) == 2
    assert {fault["code"] for fault in found["errors"]} == {"unknown_job"}


def test_the_table_as_a_page(sqlite_api: Api) -> None:
    dataset = ready_dataset(sqlite_api)
    ids = [scored_job(sqlite_api, dataset, top1=n / 10, seed=n) for n in range(7)]
    answer = sqlite_api.client.get(
        "/jobs/compare", params={"ids": ",".join(ids)}, headers={"accept": "text/html"}
    )
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.count("<table") == 3, "five jobs beside each other at most, and the seeds"
    assert "★ 60.0 %" in answer.text and "30.0 % ± 21.6 %" in answer.text
    assert all(f'href="/jobs/{one}/report"' in answer.text for one in ids)


def test_there_is_no_best_where_nothing_can_be_compared(sqlite_api: Api) -> None:
    ids = [
        scored_job(sqlite_api, ready_dataset(sqlite_api, f"stores/{n}"), top1=n / 10)
        for n in range(2)
    ]
    page = sqlite_api.client.get(
        "/jobs/compare", params={"ids": ",".join(ids), "format": "html"}
    ).text
    assert "not comparable" in page and "★" not in page


def test_the_answer_is_described(sqlite_api: Api) -> None:
    described = sqlite_api.client.get("/openapi.json").json()
    answer = described["paths"]["/jobs/compare"]["get"]["responses"]["200"]["content"]
    assert answer["application/json"]["schema"]["$ref"].endswith("/JobsComparison")
    assert "text/html" in answer
