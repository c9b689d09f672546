"""The embedding process as clients see it: a real server, real HTTP."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.service.embeddings.conftest import (
    EmbedServer,
    Vectors,
    as_png,
    data_uri,
    embed,
    picture,
    problem,
)


def plain_timm(folder: Path, images: list[Image.Image]) -> Vectors:
    """What somebody without ctune gets from the model directory."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    transform = timm.data.transforms_factory.create_transform(**config)
    with torch.inference_mode():
        vectors: Vectors = model(torch.stack([transform(image) for image in images])).numpy()
    return vectors


# --- vectors ---


def test_vectors_equal_those_of_plain_timm(server: EmbedServer) -> None:
    images = [picture(n, 13 + 7 * n, 40) for n in range(9)]
    wanted = plain_timm(server.data_dir / "models/mdl_a", images)
    np.testing.assert_allclose(embed(server, images), wanted, atol=1e-5)
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(server, images, normalize=True), unit, atol=1e-5)


def test_shape_of_the_answer(server: EmbedServer) -> None:
    body = {"model": "mdl_a", "input": data_uri(picture(1))}
    answer = server.http.post("/v1/embeddings", json=body)
    found = answer.json()
    assert found.keys() == {"object", "data", "model", "usage"}
    assert (found["object"], found["model"]) == ("list", "mdl_a")
    assert found["usage"] == {"prompt_tokens": 1, "total_tokens": 1}
    assert found["data"][0].keys() == {"object", "index", "embedding"}
    assert (found["data"][0]["object"], found["data"][0]["index"]) == ("embedding", 0)
    for name in ("X-Queue-Time", "X-Decode-Time", "X-Inference-Time", "X-Total-Time"):
        assert float(answer.headers[name]) > 0
    assert answer.headers["x-request-id"]


def test_request_of_the_openai_client(server: EmbedServer) -> None:
    body = {
        "model": "mdl_a",
        "input": [data_uri(picture(1))],
        "encoding_format": "base64",
        "dimensions": 8,
        "user": "u",
        "modality": "image",
    }
    answer = server.http.post("/v1/embeddings", json=body).json()
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(
        found, embed(server, [picture(1)], dimensions=8, normalize=True)[0]
    )


def test_base64_octet_stream_and_multipart_give_the_same_bits(server: EmbedServer) -> None:
    images = [picture(n) for n in range(3)]
    numbers = embed(server, images)
    uris = [data_uri(image) for image in images]
    body: dict[str, Any] = {"model": "mdl_a", "input": uris}
    encoded = server.http.post("/embed", json={**body, "encoding_format": "base64"}).json()
    rows = [np.frombuffer(base64.b64decode(i["embedding"]), "<f4") for i in encoded["data"]]
    np.testing.assert_array_equal(np.stack(rows), numbers)
    binary = {"accept": "application/octet-stream"}
    raw = server.http.post("/embed", json=body, headers=binary)
    assert (raw.headers["X-Rows"], raw.headers["X-Dim"]) == ("3", "24")
    assert raw.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<f4").reshape(3, 24), numbers)
    files = [("input", (f"{n}.png", as_png(image))) for n, image in enumerate(images)]
    form = server.http.post("/embed", data={"model": "mdl_a"}, files=files, headers=binary)
    np.testing.assert_array_equal(np.frombuffer(form.content, "<f4").reshape(3, 24), numbers)


def test_plain_base64_and_multipart_fields(server: EmbedServer) -> None:
    plain = base64.encodebytes(as_png(picture(1))).decode()
    body = {"model": "mdl_a", "input": [plain], "dimensions": 5, "normalize": True}
    wanted = server.http.post("/embed", json=body).json()["data"]
    fields = {"model": "mdl_a", "dimensions": "5", "normalize": "true"}
    files = [("anything", ("a.png", as_png(picture(1))))]
    assert server.http.post("/embed", data=fields, files=files).json()["data"] == wanted


def test_dimensions_are_cut_and_scaled_again(server: EmbedServer) -> None:
    whole = embed(server, [picture(1)])[0]
    cut = embed(server, [picture(1)], dimensions=7)[0]
    np.testing.assert_array_equal(cut, whole[:7])
    unit = embed(server, [picture(1)], dimensions=7, normalize=True)[0]
    np.testing.assert_allclose(unit, cut / np.linalg.norm(cut), atol=1e-6)


def test_many_clients_get_what_each_would_get_alone(server: EmbedServer) -> None:
    sets = [[picture(100 * n + k) for k in range(1 + n % 3)] for n in range(24)]
    alone = [embed(server, images) for images in sets]
    models = ["mdl_a" if n % 4 else "mdl_b" for n in range(24)]
    for n, images in enumerate(sets):
        if models[n] == "mdl_b":
            alone[n] = embed(server, images, model="mdl_b")

    def ask(n: int) -> Vectors:
        return embed(server, sets[n], model=models[n])

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(24)))
    for found, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_other_formats_and_orientation(server: EmbedServer) -> None:
    image = picture(3, 40, 24)
    for kind, options in (("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        uri = f"data:image/x;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        answer = server.http.post("/embed", json={"model": "mdl_a", "input": uri}).json()
        np.testing.assert_allclose(
            np.array(answer["data"][0]["embedding"]), embed(server, [image])[0], atol=1e-6
        )
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    answer = server.http.post("/embed", json={"model": "mdl_a", "input": uri}).json()
    turned = embed(server, [image.transpose(Image.Transpose.ROTATE_270)])[0]
    np.testing.assert_allclose(np.array(answer["data"][0]["embedding"]), turned, atol=1e-6)


def test_numbers_are_exact_and_finite(server: EmbedServer) -> None:
    body = {"model": "mdl_a", "input": [data_uri(picture(1))]}
    text = server.http.post("/embed", json=body).text

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    numbers = json.loads(text, parse_constant=refuse)["data"][0]["embedding"]
    assert [float(np.float32(number)) for number in numbers] == numbers


# --- classes ---


def test_classify(server: EmbedServer) -> None:
    images = [data_uri(picture(n)) for n in range(3)]
    body = {"model": "mdl_a", "input": images}
    answer = server.http.post("/classify", json=body)
    found = answer.json()
    assert (found["object"], found["model"]) == ("list", "mdl_a")
    assert float(answer.headers["X-Total-Time"]) > 0
    for index, item in enumerate(found["data"]):
        assert (item["object"], item["index"]) == ("classification", index)
        probabilities = [entry["probability"] for entry in item["predictions"]]
        assert {entry["label"] for entry in item["predictions"]} == {"x", "y", "z"}
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    best = server.http.post("/classify", json={**body, "top_k": 1}).json()["data"]
    assert [item["predictions"] for item in best] == [
        item["predictions"][:1] for item in found["data"]
    ]


def test_classify_needs_a_classifier(server: EmbedServer) -> None:
    body = {"model": "mdl_b", "input": [data_uri(picture(1))]}
    fault = problem(server.http.post("/classify", json=body), 422)["errors"][0]
    assert (fault["pointer"], fault["code"]) == ("/model", "no_classifier")


# --- what is refused ---


def test_every_bad_image_is_named_at_once(server: EmbedServer) -> None:
    good = data_uri(picture(1))
    images = [
        good,
        "a red shoe",
        "https://example.org/a.png",
        good,
        "data:image/png,abc",
        "data:image/png;base64," + base64.b64encode(as_png(picture(1))[:120]).decode(),
        base64.b64encode(b"%PDF-1.7").decode(),
        "",
    ]
    body = problem(server.http.post("/embed", json={"model": "mdl_a", "input": images}), 422)
    found = {fault["pointer"]: fault["code"] for fault in body["errors"]}
    assert found == {
        "/input/1": "invalid_base64",
        "/input/2": "url_not_supported",
        "/input/4": "invalid_base64",
        "/input/5": "corrupt",
        "/input/6": "unsupported_format",
        "/input/7": "empty_file",
    }
    assert body["error"]["param"] == "input.1"
    assert "URLs are not fetched" in body["errors"][1]["detail"]


def test_bad_image_among_files(server: EmbedServer) -> None:
    files = [("input", ("a.png", as_png(picture(1)))), ("input", ("b.png", b"not an image"))]
    answer = server.http.post("/embed", data={"model": "mdl_a"}, files=files)
    assert [fault["pointer"] for fault in problem(answer, 422)["errors"]] == ["/input/1"]


@pytest.mark.parametrize(
    ("change", "pointer", "code"),
    [
        ({"model": 3}, "/model", "invalid_type"),
        ({"input": []}, "/input", "missing"),
        ({"input": [[1, 2, 3]]}, "/input/0", "invalid_type"),
        ({"input": {"a": 1}}, "/input", "invalid_type"),
        ({"dimensions": 0}, "/dimensions", "out_of_range"),
        ({"dimensions": 25}, "/dimensions", "out_of_range"),
        ({"encoding_format": "hex"}, "/encoding_format", "invalid_choice"),
        ({"modality": "text"}, "/modality", "invalid_choice"),
        ({"dimension": 3}, "/dimension", "unknown_field"),
    ],
)
def test_fields_that_are_wrong(
    server: EmbedServer, change: dict[str, Any], pointer: str, code: str
) -> None:
    body = {"model": "mdl_a", "input": [data_uri(picture(1))], **change}
    faults = problem(server.http.post("/embed", json=body), 422)["errors"]
    assert [(fault["pointer"], fault["code"]) for fault in faults] == [(pointer, code)]


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", "/classify"])
@pytest.mark.parametrize("model", ["mdl_unknown", "../../etc", "", "mdl_a/../mdl_a"])
def test_unknown_model(server: EmbedServer, path: str, model: str) -> None:
    body = {"model": model, "input": [data_uri(picture(1))]}
    assert problem(server.http.post(path, json=body), 404)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"{", "application/json", 422),
        (b"[]", "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b"[" * 100_000, "application/json", 422),
        (b"abc", "text/plain", 415),
        (b"abc", "", 415),
        (b"abc", "multipart/form-data; boundary=x", 400),
        (b"abc", "multipart/form-data", 400),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n",
            "multipart/form-data; boundary=x",
            400,
        ),
    ],
)
def test_bodies_that_cannot_be_read(
    server: EmbedServer, content: bytes, media_type: str, status: int
) -> None:
    problem(
        server.http.post("/embed", content=content, headers={"content-type": media_type}), status
    )


def test_more_images_than_may_wait(server: EmbedServer) -> None:
    body = {"model": "mdl_a", "input": [data_uri(picture(1))] * 65}
    assert "65 images" in problem(server.http.post("/embed", json=body), 413)["detail"]


def test_other_host_names_are_refused(server: EmbedServer) -> None:
    problem(server.http.get("/healthz", headers={"host": "evil.example"}), 400)


def test_health(server: EmbedServer) -> None:
    assert server.http.get("/healthz").json()["status"] == "ok"
    embed(server, [picture(1)])
    ready = server.http.get("/readyz").json()
    assert "mdl_a" in ready["detail"]["models"] and ready["detail"]["pending_images"] == 0
