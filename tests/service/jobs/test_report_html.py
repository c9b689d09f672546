"""The report as a page: what it says of jobs in every state, and that names cannot do harm."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from ctune.figures_file import FiguresFile, read_figures
from service.jobs import lifecycle, output_routes
from service.jobs.lifecycle import Ending
from service.jobs.page import MAX_CURVES, _stages
from tests.service import rows
from tests.service.conftest import Api
from tests.service.jobs.reported import HOSTILE, LONG, add_reported_job
from tests.service.problems import faults, problem

HTML = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
SECTIONS = ("data", "scores", "curves", "cosines", "classes", "map", "neighbours", "warnings")
VOID = ("meta", "link", "img", "br")


class Page(HTMLParser):
    """Tags with their attributes, and the text; it insists that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of one kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def section(self, text: str, name: str) -> str:
        """Return the source of one section."""
        found = re.search(rf'<section id="{name}">.*?</section>', text, re.DOTALL)
        assert found is not None
        return found.group()


def page_of(api: Api, job: str) -> tuple[str, Page]:
    answer = api.client.get(f"/jobs/{job}/report", headers=HTML)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text, Page(answer.text)


def test_the_page_of_a_finished_job(api: Api) -> None:
    _, page = page_of(api, add_reported_job(api))
    for said in (
        "k-NN, top-1 accuracy: 25.0 % before, 75.0 % after tuning (+50.0 percentage points)",
        "102 train",
        "4 (<script>alert('x')</script>)",
        "k 20, temperature 0.07",
        "mean 0.8 within classes",
        "22 of 30 images right (73.3 %)",
        "the plane holds 50.0 % of the variance",
        "lower the learning rate",
        'timm.create_model("local-dir:mdl_',
        "torch 2.9",
        "seed 3",
        "1 not finite",
        "12,800",
    ):
        assert said in page.text, said
    assert set(SECTIONS) <= {section.get("id") for section in page.of("section")}
    charts = [svg["aria-label"] for svg in page.of("svg") if svg.get("role") == "img"]
    # curves, histograms, matrices of two predictions, maps, diagnostics; before and after
    assert len(charts) == 4 + 2 + 4 + 2 + 4 and all(charts)
    shown = [image["alt"] or "" for image in page.of("img")]
    assert [alt for alt in shown if alt.startswith("image, ")] == ["image, 1", "image, 2"]
    assert f"reconstructions {HOSTILE}" in page.text
    assert charts[0] is not None and "loss: 1 at step 0" in charts[0]
    assert "Not there" not in page.text


def test_direction_is_shown(sqlite_api: Api) -> None:
    text, page = page_of(sqlite_api, add_reported_job(sqlite_api))
    scores = page.section(text, "scores")
    changes = re.findall(r'<td class="number">([+−][\d.]+) <span class="(\w+)">', scores)
    assert changes == [("+50.0", "better"), ("+0.3", "better"), ("+0.25", "worse")]


def test_names_can_do_no_harm(sqlite_api: Api) -> None:
    text, page = page_of(sqlite_api, add_reported_job(sqlite_api))
    assert "<script" not in text and page.text.count(HOSTILE) >= 8
    assert not page.of("script") and not page.of("iframe") and not page.of("object")
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    sources = [image["src"] or "" for image in page.of("img")]
    assert len(sources) == 11 + 6 and all(s.startswith("data:image/webp;base64,") for s in sources)
    assert {link["href"] for link in page.of("link")} == {"data:,"}
    assert all((a["href"] or "").startswith("#") for a in page.of("a"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_nothing_may_be_loaded_or_run(sqlite_api: Api) -> None:
    job = add_reported_job(sqlite_api)
    answer = sqlite_api.client.get(f"/jobs/{job}/report", headers=HTML)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["vary"] == "accept"


def test_tables_and_pictures_can_be_heard(sqlite_api: Api) -> None:
    _, page = page_of(sqlite_api, add_reported_job(sqlite_api))
    assert all(th.get("scope") for th in page.of("th"))
    assert all(image.get("alt") for image in page.of("img"))
    assert all(s.get("aria-label") or s.get("aria-hidden") for s in page.of("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.of("html") == [{"lang": "en"}]
    viewport = [m for m in page.of("meta") if m.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_the_page_is_small(sqlite_api: Api) -> None:
    text, _ = page_of(sqlite_api, add_reported_job(sqlite_api, images=2000))
    assert len(text.encode()) < 1_000_000


@pytest.mark.parametrize(
    ("query", "headers", "kind"),
    [
        ({}, {}, "application/json"),
        ({}, {"accept": "*/*"}, "application/json"),
        ({"format": "json"}, HTML, "application/json"),
        ({"format": "html"}, {"accept": "application/json"}, "text/html"),
    ],
)
def test_which_form_is_given(
    sqlite_api: Api, query: dict[str, str], headers: dict[str, str], kind: str
) -> None:
    job = add_reported_job(sqlite_api)
    answer = sqlite_api.client.get(f"/jobs/{job}/report", params=query, headers=headers)
    assert answer.headers["content-type"].startswith(kind)


def test_errors_are_problems_also_for_browsers(sqlite_api: Api) -> None:
    problem(sqlite_api.client.get("/jobs/job_1/report", headers=HTML), 404)
    answer = sqlite_api.client.get("/jobs/job_1/report", params={"format": "pdf"})
    assert set(faults(answer)) == {"/format"}


def test_a_waiting_job(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session).id
    _, page = page_of(sqlite_api, job)
    assert "The job waits for a worker." in page.text and "load the page again" in page.text
    assert not [svg for svg in page.of("svg") if svg.get("role") == "img"], "no empty pictures"
    assert page.text.count("Not there yet") == 4
    assert "The job makes it at its end." in page.text


def test_classes_of_equal_size_are_counted_once(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        dataset = rows.add_ready_dataset(session, {"oak": 8, "pine": 8}).id
        job = rows.add_job(session, dataset).id
    _, page = page_of(sqlite_api, job)
    assert "Training images per class8\n" in page.text


def test_no_transaction_is_open_while_files_are_read(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_reported_job(api)
    open_connections = []

    def read(path: Path) -> FiguresFile | None:
        open_connections.append(api.app.state.database.engine.pool.checkedout())
        return read_figures(path)

    monkeypatch.setattr(output_routes, "read_figures", read)
    page_of(api, job)
    assert open_connections == [0]


def test_a_running_job_shows_what_there_is(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session).id
        lease = rows.start(session)
        lifecycle.enter_phase(session, lease, "contrastive")
        rows.add_event(
            session, job, "evaluation", {"when": "before", "results": {"knn": {"top1": 0.5}}}
        )
    _, page = page_of(sqlite_api, job)
    assert "The job runs: contrastive" in page.text and "50.0 %" in page.text


def test_a_failed_job_says_why_and_what_to_do(sqlite_api: Api) -> None:
    error = {
        "code": "diverged", "message": f"loss is nan {HOSTILE}", "hint": "lower the rate",
        "fault": "user", "retryable": False, "phase": "contrastive", "log_tail": "last words\n",
    }  # fmt: skip
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session, config={"encoder": rows.ENCODER, "method": rows.METHOD}).id
        assert lifecycle.finish(session, rows.start(session), Ending("failed", error=error))
    text, page = page_of(sqlite_api, job)
    assert "The job has failed" in page.text and "<script" not in text
    for said in ("loss is nan", "What to do: lower the rate", "in phase contrastive", "last words"):
        assert said in page.text
    assert "The job ended before anything was scored." in page.text
    assert "The job left no model." in page.text


def test_an_error_of_which_little_is_known(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session).id
        error = {"code": "lost", "message": "the worker was lost"}
        assert lifecycle.finish(session, rows.start(session), Ending("failed", error=error))
    _, page = page_of(sqlite_api, job)
    assert "the worker was lost" in page.text and "What to do" not in page.text


def test_a_cancelled_job(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session).id
        assert lifecycle.finish(session, rows.start(session), Ending("cancelled"))
    _, page = page_of(sqlite_api, job)
    assert "The job was cancelled" in page.text


def test_figures_of_an_earlier_attempt_and_of_none(sqlite_api: Api) -> None:
    job = add_reported_job(sqlite_api)
    sqlite_api.storage.job_run(job, 2).create()  # a later attempt that had no time for figures
    assert "22 of 30 images right" in page_of(sqlite_api, job)[1].text
    run = sqlite_api.storage.job_run(job, 1)
    run.figures.write_text(FiguresFile().model_dump_json(), encoding="utf-8")
    _, page = page_of(sqlite_api, job)
    assert page.text.count("Not there: it needs labelled held-out images") == 4
    run.figures.unlink()
    assert "was not scored" in page_of(sqlite_api, job)[1].text


def test_a_data_set_that_is_gone_is_said(sqlite_api: Api) -> None:
    with sqlite_api.database.writing() as session:
        job = rows.add_job(session, "ds_gone").id
    assert "The data set has been deleted" in page_of(sqlite_api, job)[1].text


def test_long_names_are_cut_in_charts_only(sqlite_api: Api) -> None:
    _, page = page_of(sqlite_api, add_reported_job(sqlite_api))
    assert LONG in page.text and f"{LONG[:10]}… 3" in page.text


def test_no_stage_crowds_out_the_curves_of_another() -> None:
    stays = [{"phase": stage} for stage in ("mae", "head_init", "contrastive_tuning")]
    series = [
        {"stage": stay["phase"], "name": f"metric_{n}", "values": [1.0, 2.0], "steps": [0, 1]}
        for stay in stays
        for n in range(MAX_CURVES + 1)
    ]
    stages, left_out = _stages(series, stays)
    assert [(one["name"], len(one["curves"])) for one in stages] == [
        (stay["phase"], MAX_CURVES) for stay in stays
    ]
    assert len(left_out) == len(stays)
