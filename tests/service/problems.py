"""What every error answer of the API must be."""

import httpx

from ctune.schema import JsonObject


def problem(answer: httpx.Response, status: int) -> JsonObject:
    """Return the body of an error answer after checking everything that all of them share."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: JsonObject = answer.json()
    assert body["status"] == status
    assert body["type"].startswith("https://") and body["title"] and body["instance"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == body["detail"]
    assert "Traceback" not in answer.text and ".py" not in answer.text
    for said in (body["detail"], *(fault["detail"] for fault in body["errors"])):
        assert len(said) > 20 and said.endswith("."), f"says too little: {said!r}"
    if status == 409:
        assert answer.headers["x-should-retry"] == "false"
    return body


def faults(answer: httpx.Response) -> dict[str, JsonObject]:
    """Return the faults of a 422 by their pointers."""
    found = problem(answer, 422)["errors"]
    by_pointer = {fault["pointer"]: fault for fault in found}
    assert len(by_pointer) == len(found), "two faults with one pointer"
    return by_pointer
