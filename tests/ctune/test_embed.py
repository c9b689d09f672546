import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ctune.backbones import build_encoder
from ctune.embed import load_model, read_reference_images
from ctune.encoders import TimmEncoder
from ctune.errors import EncoderError
from ctune.export import export_model
from ctune.model_dir import hash_file

TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}


def images(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    shape = (20, 30, 3)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = TimmEncoder(
        name="vit_tiny_patch16_224", pretrained=False, image_size_px=16, options=TINY
    )
    path = tmp_path_factory.mktemp("exported") / "model"
    export_model(
        build_encoder(config, pool="mean", encoder_dir=None),
        path,
        provenance={},
        evaluation={},
        reference_images=images(),
        classes=["x", "y", "z"],
        heads={"classifier": nn.Linear(24, 3)},
    )
    return path


@pytest.fixture
def model_dir(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def reseal(model_dir: Path, name: str) -> None:
    """Make `model.json` agree with a changed file."""
    path = model_dir / "model.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["files"][name] = hash_file(model_dir / name)
    path.write_text(json.dumps(info), encoding="utf-8")


def test_reference_images_give_the_reference_vectors(exported: Path) -> None:
    model = load_model(exported)
    found = model.verify()
    assert found.num_images == 3
    assert found.min_cosine > 0.999999 and found.max_abs_diff < 1e-6
    stored = load_file(exported / "reference/vectors.safetensors")
    pictures = read_reference_images(exported)
    torch.testing.assert_close(model.embed(pictures), stored["vectors"], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.classify(pictures), stored["probabilities"], rtol=0, atol=1e-6)


def test_images_and_prepared_images_in_any_batch_give_the_same(exported: Path) -> None:
    model = load_model(exported)
    pictures = images(70)
    together = model.embed(pictures)
    assert together.shape == (70, 24) and together.dtype == torch.float32
    prepared = [model.prepare(picture) for picture in pictures]
    assert torch.equal(model.embed(prepared), together)
    assert torch.equal(model.embed(torch.stack(prepared)), together)
    alone = torch.cat([model.embed([picture]) for picture in pictures])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert model.embed([]).shape == (0, 24)


def test_normalised_vectors_have_unit_length(exported: Path) -> None:
    model = load_model(exported)
    plain, unit = model.embed(images()), model.embed(images(), normalize=True)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(unit * plain.norm(dim=1, keepdim=True), plain)


def test_classify(exported: Path) -> None:
    model = load_model(exported)
    probabilities = model.classify(images())
    assert model.classes == ["x", "y", "z"]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert torch.equal(model.probabilities(model.embed(images()).numpy()), probabilities)


def test_size_is_that_of_the_weights(exported: Path) -> None:
    stored = [load_file(exported / f"{name}.safetensors") for name in ("model", "classifier")]
    wanted = sum(4 * tensor.numel() for tensors in stored for tensor in tensors.values())
    assert load_model(exported).size_bytes == wanted


def test_without_a_classifier(exported: Path, tmp_path: Path) -> None:
    encoder = build_encoder(
        TimmEncoder(name="resnet18", pretrained=False, image_size_px=32),
        pool="auto",
        encoder_dir=None,
    )
    export_model(
        encoder,
        tmp_path / "m",
        provenance={},
        evaluation={},
        reference_images=images(),
        classes=["a", "b"],
    )
    model = load_model(tmp_path / "m")
    assert model.classes is None
    with pytest.raises(EncoderError, match="no classifier") as caught:
        model.classify(images())
    assert caught.value.error_code == "no_classifier"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "classifier.safetensors", "reference/001.png"]
)
def test_a_changed_byte_is_found(model_dir: Path, name: str) -> None:
    data = bytearray((model_dir / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model_dir / name).write_bytes(data)
    with pytest.raises(EncoderError, match=f"{name} has sha256") as caught:
        load_model(model_dir)
    assert caught.value.error_code == "model_damaged"


def test_every_missing_file_is_named(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"config\.json is missing.*model\.safetensors is"):
        load_model(model_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"files": {}},
        {"files": {"../secret": "00"}},
        {"embed_dim": 0},
        {"surprise": 1},
    ],
)
def test_a_model_json_that_cannot_be_believed(model_dir: Path, change: dict[str, Any]) -> None:
    path = model_dir / "model.json"
    info = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(EncoderError) as caught:
        load_model(model_dir)
    assert caught.value.error_code == "model_damaged"


def test_no_model_json(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"model\.json cannot be read"):
        load_model(tmp_path)


def test_vectors_that_no_longer_come_out_are_found(model_dir: Path) -> None:
    name = "model.safetensors"
    weights = load_file(model_dir / name)
    weights["patch_embed.proj.weight"] = torch.randn_like(weights["patch_embed.proj.weight"]) * 5
    save_file(weights, model_dir / name)
    reseal(model_dir, name)
    with pytest.raises(EncoderError, match="smallest cosine") as caught:
        load_model(model_dir).verify()
    assert caught.value.error_code == "vectors_differ"


def test_weights_that_are_not_finite_give_an_error_not_a_vector(model_dir: Path) -> None:
    name = "model.safetensors"
    weights = load_file(model_dir / name)
    weights["pos_embed"][0, 0, 0] = float("nan")
    save_file(weights, model_dir / name)
    reseal(model_dir, name)
    with pytest.raises(EncoderError, match="not finite") as caught:
        load_model(model_dir).embed(images())
    assert caught.value.error_code == "not_finite"
