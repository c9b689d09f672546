import asyncio
import sys
from pathlib import Path

import httpx
import pytest

from service.embeddings.app import create_embed_app, main
from service.settings import Settings
from tests.service.embeddings.conftest import as_png, picture


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "", "::"])
def test_only_loopback(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["embed", "--host", host])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "not a loopback address" in capsys.readouterr().err


def test_the_body_has_a_limit(tmp_path: Path) -> None:
    app = create_embed_app(Settings(data_dir=tmp_path), max_body_bytes=1000)

    async def ask() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                files = [("input", ("a.png", as_png(picture(1))))]
                return await client.post("/embed", data={"model": "m"}, files=files)

    answer = asyncio.run(ask())
    assert answer.status_code == 413
    assert "larger than 1000 bytes" in answer.json()["detail"]
