"""GET /methods: what clients build forms and requests from."""

from ctune.methods import METHOD_CONFIGS
from tests.service.conftest import Api
from tests.service.problems import problem


def test_every_method_is_described(sqlite_api: Api) -> None:
    found = sqlite_api.client.get("/methods").json()
    assert found["object"] == "list" and not found["has_more"]
    assert [item["name"] for item in found["data"]] == list(METHOD_CONFIGS)
    for item in found["data"]:
        assert len(item["description"]) > 20 and item["needs"]
        properties = item["config_schema"]["properties"]
        assert all(field.get("description") for name, field in properties.items() if name != "name")
        assert set(item["defaults"]) == {"paper", "small"}
        for preset, defaults in item["defaults"].items():
            assert defaults["preset"] == preset and set(defaults) == set(properties)
            METHOD_CONFIGS[item["name"]].model_validate(defaults)
        assert sqlite_api.client.get(f"/methods/{item['name']}").json() == item


def test_presets_differ_where_they_should(sqlite_api: Api) -> None:
    defaults = sqlite_api.client.get("/methods/lacvit").json()["defaults"]
    assert defaults["paper"]["contrastive"]["epochs"] == 500
    assert defaults["small"]["contrastive"]["epochs"] == 30


def test_an_unknown_method(sqlite_api: Api) -> None:
    assert "GET /methods" in problem(sqlite_api.client.get("/methods/lacvitt"), 404)["detail"]
