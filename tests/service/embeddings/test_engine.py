import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ctune.errors import DataError
from service.embeddings.engine import Engine, ModelUnusableError, UnknownModelError
from service.storage import Storage
from tests.service.embeddings.conftest import as_png, export_tiny, picture

LARGE = 2**30


def make_engine(data_dir: Path, cache_bytes: int = LARGE) -> Engine:
    return Engine(Storage(data_dir), cache_bytes=cache_bytes, max_pixels=10_000, device="cpu")


def test_a_model_is_loaded_once_also_by_many_threads(data_dir: Path) -> None:
    engine = make_engine(data_dir)
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(engine.model, ["mdl_a"] * 8))
    assert len({id(model) for model in models}) == 1
    assert engine.loaded == ["mdl_a"]


def test_the_least_recently_used_model_leaves(data_dir: Path) -> None:
    engine = make_engine(data_dir)
    size = engine.model("mdl_a").size_bytes
    shutil.copytree(data_dir / "models/mdl_b", data_dir / "models/mdl_c")
    engine = make_engine(data_dir, cache_bytes=int(2.5 * size))
    for name in ("mdl_a", "mdl_b", "mdl_a", "mdl_c"):
        engine.model(name)
    assert engine.loaded == ["mdl_a", "mdl_c"]


def test_a_model_above_the_budget_is_loaded_alone(data_dir: Path) -> None:
    engine = make_engine(data_dir, cache_bytes=1)
    engine.model("mdl_a")
    engine.model("mdl_b")
    assert engine.loaded == ["mdl_b"]


def test_a_deleted_model_is_gone_from_memory_too(data_dir: Path) -> None:
    engine = make_engine(data_dir)
    engine.model("mdl_a")
    shutil.rmtree(data_dir / "models/mdl_a")
    with pytest.raises(UnknownModelError):
        engine.model("mdl_a")
    assert engine.loaded == []


def test_a_replaced_model_is_loaded_again(data_dir: Path) -> None:
    engine = make_engine(data_dir)
    before = engine.model("mdl_a")
    export_tiny(data_dir / "models/mdl_a", seed=9, classes=None)
    after = engine.model("mdl_a")
    assert after is not before and after.classes is None
    assert engine.loaded == ["mdl_a"]


@pytest.mark.parametrize("name", ["mdl_x", "", ".", "..", "../models/mdl_a", "mdl_a/", "a" * 65])
def test_unknown_ids(data_dir: Path, name: str) -> None:
    with pytest.raises(UnknownModelError):
        make_engine(data_dir).model(name)


def test_a_damaged_model_is_refused_without_telling_paths(data_dir: Path) -> None:
    path = data_dir / "models/mdl_a/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    engine = make_engine(data_dir)
    with pytest.raises(ModelUnusableError, match="mdl_a is damaged") as caught:
        engine.model("mdl_a")
    assert str(data_dir) not in str(caught.value)
    assert engine.loaded == []


def test_vectors_and_probabilities(data_dir: Path) -> None:
    engine = make_engine(data_dir)
    model = engine.model("mdl_a")
    items = [engine.prepare(model, as_png(picture(n))) for n in range(3)]
    vectors = np.stack(engine.vectors(model, items))
    assert vectors.shape == (3, 24) and vectors.dtype == np.float32
    probabilities = engine.probabilities(model, vectors)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "data", [b"", b"hello", as_png(picture(0))[:99], as_png(picture(0, 200, 51))]
)
def test_what_is_no_image(data_dir: Path, data: bytes) -> None:
    engine = make_engine(data_dir)
    with pytest.raises(DataError):
        engine.prepare(engine.model("mdl_a"), data)
