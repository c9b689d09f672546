"""What `ctune jobs compare` prints."""

from cli.output import console, print_table
from ctune.schema import JsonObject
from service.jobs.numerals import duration, score, score_order, words


def show_comparison(found: JsonObject) -> None:
    """Print the jobs, their scores after tuning (and before), means over seeds, and warnings.

    Scores below scores (of one k, of one shot) are left to `--json` and the page.
    """
    for number, job in enumerate(found["jobs"], start=1):
        told = (job["name"], job["method"], job["encoder"], f"seed {job['seed']}", job["status"])
        line = f"{number}  {job['id']}  {', '.join(part for part in told if part)}"
        console.print(f"{line}, {duration(job['train_s'])}", markup=False, highlight=False)
    jobs = found["jobs"]
    numbers = {job["id"]: str(number) for number, job in enumerate(jobs, start=1)}
    if found["scores"]:
        print_table(("after (before)", *numbers.values()), score_rows(found))
    for group in found["groups"]:
        members = ", ".join(numbers[one] for one in group["jobs"])
        print_table(
            (f"jobs {members}, mean ± std over seeds", "before", "after"), group_rows(group)
        )
    for warning in found["warnings"]:
        members = ", ".join(numbers[one] for one in warning["jobs"])
        console.print(f"warning (jobs {members}): {warning['message']}", markup=False)


def score_rows(found: JsonObject) -> list[tuple[str, ...]]:
    """Return per score its name and, of every job, its value after tuning and that before."""
    return [
        (
            f"{words(row['protocol'])}, {words(row['metric'])}",
            *(
                f"{score(value['after'], row['metric'])} ({score(value['before'], row['metric'])})"
                for value in row["values"]
            ),
        )
        for row in found["scores"]
        if "." not in row["metric"]
    ]


def report_rows(report: JsonObject) -> list[tuple[str, str, str]]:
    """Return (score, before, after) for every score of a report."""
    return [
        (
            f"{words(row['protocol'])}, {words(row['metric'])}",
            score(row["before"], row["metric"]),
            score(row["after"], row["metric"]),
        )
        for row in sorted(
            report["comparison"], key=lambda row: score_order(row["protocol"], row["metric"])
        )
    ]


def group_rows(group: JsonObject) -> list[tuple[str, str, str]]:
    """Return per score its name and its mean and spread over seeds, before and after."""
    rows = []
    for one in group["scores"]:
        if "." in one["metric"]:
            continue
        shown = []
        for when in ("before", "after"):
            mean, std = one[f"{when}_mean"], one[f"{when}_std"]
            text = score(mean, one["metric"])
            shown.append(text if std is None else f"{text} ± {score(std, one['metric'])}")
        rows.append((f"{words(one['protocol'])}, {words(one['metric'])}", shown[0], shown[1]))
    return rows
