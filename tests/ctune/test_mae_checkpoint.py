"""Checkpoints in the exact key layout of facebookresearch/mae and ml-jku/MAE-CT, random weights."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import ctune
from ctune import mae_checkpoint
from ctune import weights as weights_module
from ctune.backbones import Encoder, Pool, build_encoder
from ctune.encoders import FileEncoder, TimmEncoder
from ctune.errors import CheckpointFormatError, EncoderError
from ctune.mae_checkpoint import (
    convert_encoder_state_dict,
    fit_encoder_state_dict,
    is_published_state_dict,
)
from ctune.model_dir import read_info
from ctune.position_embedding import get_2d_sincos_pos_embed, resize_pos_embed
from ctune.weights import write_weights
from tests.squares import tiny_config, write_archive

VIT = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
BLOCK_SHAPES = {
    "norm1.weight": "D",
    "norm1.bias": "D",
    "attn.qkv.weight": "3D D",
    "attn.qkv.bias": "3D",
    "attn.proj.weight": "D D",
    "attn.proj.bias": "D",
    "norm2.weight": "D",
    "norm2.bias": "D",
    "mlp.fc1.weight": "4D D",
    "mlp.fc1.bias": "4D",
    "mlp.fc2.weight": "D 4D",
    "mlp.fc2.bias": "D",
}


def blocks(prefix: str, depth: int, width: int) -> dict[str, Tensor]:
    sides = {"D": width, "3D": 3 * width, "4D": 4 * width}
    return {
        f"{prefix}.{n}.{name}": 0.3 * torch.randn([sides[side] for side in shape.split()])
        for n in range(depth)
        for name, shape in BLOCK_SHAPES.items()
    }


def official_encoder(patches: int = 16) -> dict[str, Tensor]:
    """What `mae_pretrain_vit_*.pth` holds under `model`: 1 + L positions."""
    torch.manual_seed(5)
    return {
        "cls_token": torch.randn(1, 1, 24),
        "pos_embed": torch.randn(1, 1 + patches, 24),
        "patch_embed.proj.weight": torch.randn(24, 3, 4, 4),
        "patch_embed.proj.bias": torch.randn(24),
        **blocks("blocks", 2, 24),
        "norm.weight": 1 + torch.randn(24),
        "norm.bias": torch.randn(24),
    }


def official_full(patches: int = 16) -> dict[str, Tensor]:
    """What a checkpoint of the pre-training holds under `model`."""
    return {
        **official_encoder(patches),
        "mask_token": torch.randn(1, 1, 16),
        "decoder_pos_embed": torch.randn(1, 1 + patches, 16),
        "decoder_embed.weight": torch.randn(16, 24),
        "decoder_embed.bias": torch.randn(16),
        **blocks("decoder_blocks", 1, 16),
        "decoder_norm.weight": torch.randn(16),
        "decoder_norm.bias": torch.randn(16),
        "decoder_pred.weight": torch.randn(48, 16),
        "decoder_pred.bias": torch.randn(48),
    }


def without_class_row(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


FORMS: dict[str, Any] = {
    "encoder": {"model": official_encoder()},
    "full": {
        "model": official_full(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 799,
        "args": argparse.Namespace(model="mae_vit_tiny", blr=1.5e-4),
    },
    "maect": {"state_dict": without_class_row(official_encoder()), "epoch": 3},
}


def load(path: Path, *, pool: Pool = "auto", allow: bool = True, **fields: Any) -> Encoder:
    given = {"name": VIT, "image_size_px": 16, "options": TINY, **fields}
    config = FileEncoder(path=str(path), **given)
    return build_encoder(config, pool=pool, encoder_dir=None, allow_noncommercial_weights=allow)


def saved(tmp_path: Path, checkpoint: Any) -> Path:
    torch.save(checkpoint, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


# --- telling the forms apart ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_timm_state_dict(form: str) -> None:
    converted = convert_encoder_state_dict(FORMS[form])
    model = timm.create_model(VIT, img_size=16, num_classes=0, **TINY)
    model.load_state_dict(converted, strict=True)
    wanted = official_encoder()
    if form == "maect":
        wanted["pos_embed"][:, :1] = 0
    assert all(torch.equal(converted[key], value) for key, value in wanted.items())


def test_what_belongs_to_a_classifier_is_dropped() -> None:
    extra = {"head.weight": torch.ones(5, 24), "fc_norm.bias": torch.ones(24)}
    converted = convert_encoder_state_dict({"model": official_encoder() | extra})
    assert converted.keys() == official_encoder().keys()


@pytest.mark.parametrize(
    ("checkpoint", "named"),
    [
        ({"weights": official_encoder(), "epoch": 3}, "weights, epoch"),
        (official_encoder(), "cls_token, pos_embed"),
        ({"model": {"conv1.weight": torch.ones(1)}, "epoch": 3}, "model, epoch.*conv1.weight"),
        ({"model": torch.ones(2)}, "holds model$"),
        ({}, "holds nothing"),
    ],
)
def test_unknown_forms_name_what_was_found(checkpoint: Any, named: str) -> None:
    with pytest.raises(CheckpointFormatError, match=named) as caught:
        convert_encoder_state_dict(checkpoint)
    assert caught.value.error_code == "checkpoint_format"


@pytest.mark.parametrize("rows", [1, 3, 7, 18])
def test_positions_must_be_those_of_a_square(rows: int) -> None:
    state = official_encoder() | {"pos_embed": torch.ones(1, rows, 24)}
    with pytest.raises(CheckpointFormatError, match=f"{rows} rows"):
        convert_encoder_state_dict({"model": state})


# --- from a file to an encoder ---


@pytest.mark.parametrize(("form", "licence"), [("encoder", "cc"), ("full", "cc"), ("maect", "u")])
def test_a_file_loads_with_every_weight(tmp_path: Path, form: str, licence: str) -> None:
    encoder = load(saved(tmp_path, FORMS[form]))
    assert encoder.licence == {"cc": "cc-by-nc-4.0", "u": "unknown"}[licence]
    assert encoder.mean == (0.485, 0.456, 0.406)
    assert encoder.model_args["global_pool"] == "token"
    loaded, wanted = encoder.backbone.state_dict(), convert_encoder_state_dict(FORMS[form])
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def test_the_pretraining_as_safetensors_is_recognised(tmp_path: Path) -> None:
    save_file(official_full(), tmp_path / "mae.safetensors")
    encoder = load(tmp_path / "mae.safetensors", image_size_px=24)
    wanted = resize_pos_embed(official_encoder()["pos_embed"], 6)
    assert torch.equal(encoder.backbone.state_dict()["pos_embed"], wanted)
    with pytest.raises(EncoderError, match="published masked autoencoder"):
        load(tmp_path / "mae.safetensors", allow=False)


def fixed_positions(width: int, grid: int) -> Tensor:
    return torch.from_numpy(get_2d_sincos_pos_embed(width, grid, cls_token=True)).float()[None]


def flat_encoder(width: int, depth: int, patch: int, grid: int = 2) -> dict[str, Tensor]:
    """The keys by which an encoder is told, without memory for the large ones."""
    return {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": fixed_positions(width, grid),
        "patch_embed.proj.weight": torch.zeros(1).expand(width, 3, patch, patch),
        **{f"blocks.{n}.norm1.weight": torch.ones(1).expand(width) for n in range(depth)},
        "norm.weight": torch.ones(width),
    }


@pytest.mark.parametrize(
    ("sizes", "changes", "published"),
    [
        ((768, 12, 16), {}, True),
        ((1024, 24, 16), {}, True),
        ((1280, 32, 14), {}, True),
        ((768, 12, 16), {"pos_embed": fixed_positions(768, 2).bfloat16()}, True),
        ((768, 12, 16), {"pos_embed": 0.02 * torch.ones(1, 5, 768)}, False),
        ((768, 12, 16), {"pos_embed": fixed_positions(768, 2)[:, 1:]}, False),
        ((768, 11, 16), {}, False),
        ((384, 12, 16), {}, False),
        ((768, 12, 8), {}, False),
    ],
)
def test_a_published_encoder_is_told_by_size_and_positions(
    sizes: tuple[int, int, int], changes: dict[str, Tensor], published: bool
) -> None:
    assert is_published_state_dict(flat_encoder(*sizes) | changes) is published


def test_an_encoder_without_its_decoder_needs_consent_as_safetensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = official_encoder() | {"pos_embed": fixed_positions(24, 4)}
    save_file(weights, tmp_path / "mae.safetensors")
    assert load(tmp_path / "mae.safetensors", allow=False).licence == "unknown"
    monkeypatch.setattr(mae_checkpoint, "PUBLISHED_SIZES", {(24, 2, 4)})
    with pytest.raises(EncoderError, match="published masked autoencoder"):
        load(tmp_path / "mae.safetensors", allow=False)
    assert load(tmp_path / "mae.safetensors").licence == "cc-by-nc-4.0"


@pytest.mark.parametrize("name", ["mae.pth", "own.safetensors"])
def test_a_fixed_table_can_be_recomputed_at_another_size(tmp_path: Path, name: str) -> None:
    weights = official_encoder() | {"pos_embed": fixed_positions(24, 4)}
    path = tmp_path / name
    if name == "mae.pth":
        torch.save({"model": weights}, path)
    else:
        save_file(weights, path)
    resized = load(path, image_size_px=24).backbone.state_dict()
    encoder = load(path, image_size_px=24, pos_embed_resize="recompute")
    loaded = encoder.backbone.state_dict()
    assert torch.equal(loaded["pos_embed"], fixed_positions(24, 6))
    assert not torch.allclose(resized["pos_embed"], loaded["pos_embed"], atol=0.05)
    others = loaded.keys() - {"pos_embed"}
    assert all(torch.equal(loaded[key], weights[key]) for key in others)


def test_trained_positions_are_not_recomputed(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="they were trained") as caught:
        load(saved(tmp_path, FORMS["encoder"]), pos_embed_resize="recompute")
    assert caught.value.error_code == "weights_mismatch" and "interpolate" in caught.value.hint
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "cnn.safetensors")
    with pytest.raises(EncoderError, match="a table of positions"):
        load(
            tmp_path / "cnn.safetensors",
            name="resnet18",
            options={},
            pos_embed_resize="recompute",
        )


@pytest.mark.parametrize("licence", [None, "mit", "cc-by-nc-4.0"])
def test_weights_of_ctune_say_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, licence: str | None
) -> None:
    monkeypatch.setattr(mae_checkpoint, "PUBLISHED_SIZES", {(24, 2, 4)})
    weights = official_encoder() | {"pos_embed": fixed_positions(24, 4)}
    write_weights(tmp_path / "own.safetensors", weights, licence=licence)
    assert load(tmp_path / "own.safetensors").licence == licence
    if licence == "cc-by-nc-4.0":
        with pytest.raises(EncoderError, match="cc-by-nc"):
            load(tmp_path / "own.safetensors", allow=False)
    else:
        load(tmp_path / "own.safetensors", allow=False)


@pytest.mark.parametrize("size_px", [12, 24])
def test_another_size_resizes_positions_as_the_official_code(tmp_path: Path, size_px: int) -> None:
    encoder = load(saved(tmp_path, FORMS["encoder"]), image_size_px=size_px)
    positions = encoder.backbone.state_dict()["pos_embed"]
    wanted = resize_pos_embed(official_encoder()["pos_embed"], size_px // 4)
    assert torch.equal(positions, wanted)
    plain: Any = timm.create_model(VIT, img_size=size_px, num_classes=0, **TINY)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(official_encoder(), plain)
    assert (filtered["pos_embed"] - positions).abs().max() > 1e-2  # timm antialiases


def test_the_weights_that_timm_publishes_are_resized_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(official_encoder(), tmp_path / "w.safetensors")

    def download(repo: str, filename: str) -> str:
        return str(tmp_path / "w.safetensors")

    monkeypatch.setattr(weights_module, "hf_hub_download", download)
    name = "vit_base_patch16_224.mae"
    config = TimmEncoder(name=name, image_size_px=24, options=TINY)
    encoder = build_encoder(config, pool="auto", encoder_dir=None, allow_noncommercial_weights=True)
    wanted = resize_pos_embed(official_encoder()["pos_embed"], 6)
    assert torch.equal(encoder.backbone.state_dict()["pos_embed"], wanted)
    assert encoder.licence == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("pool", "options"), [("mean_of_normed", TINY), ("mean", {**TINY, "fc_norm": False})]
)
def test_the_mean_can_keep_the_trained_norm(
    tmp_path: Path, pool: Pool, options: dict[str, Any]
) -> None:
    """timm would put a new `fc_norm` in its place and leave it untrained."""
    path = saved(tmp_path, FORMS["encoder"])
    encoder = load(path, pool=pool, options=options).eval()
    backbone: Any = encoder.backbone
    assert torch.equal(backbone.norm.weight, official_encoder()["norm.weight"])
    images = torch.randn(2, 3, 16, 16)
    tokens = load(path).eval().backbone.forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(encoder(images), tokens[:, 1:].mean(1))
    fresh: Any = load(path, pool="mean").backbone  # as published for fine-tuning
    assert torch.equal(fresh.fc_norm.weight, torch.ones(24))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch_size": 8}, "patch size 4 x 4 in the checkpoint, 8 x 8 in the encoder"),
        ({"embed_dim": 48}, "width 24 in the checkpoint, 48"),
        ({"depth": 3}, "depth 2 in the checkpoint, 3"),
        ({"depth": 1}, "depth 2 in the checkpoint, 1"),
        ({"reg_tokens": 2}, "not those of a class token and a square"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load(saved(tmp_path, FORMS["full"]), options={**TINY, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), (VIT, {**TINY, "class_token": False, "global_pool": "avg"})],
)
def test_an_encoder_of_another_kind_is_refused(name: str, options: dict[str, Any]) -> None:
    backbone = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(EncoderError, match="not a vision transformer") as caught:
        fit_encoder_state_dict(official_encoder(), backbone)
    assert caught.value.error_code == "weights_mismatch"


@pytest.mark.parametrize("form", FORMS)
def test_published_weights_need_consent(tmp_path: Path, form: str) -> None:
    with pytest.raises(EncoderError, match="masked autoencoder") as caught:
        load(saved(tmp_path, FORMS[form]), allow=False)
    assert caught.value.error_code == "noncommercial_weights"
    assert "allow_noncommercial_weights" in caught.value.hint


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be read") as caught:
        load(saved(tmp_path, {"model": official_encoder(), "x": Path("x")}))
    assert caught.value.error_code == "weights_unreadable"
    with pytest.raises(EncoderError, match="a list"):
        load(saved(tmp_path, [1]))
    (tmp_path / "mae.pth").write_bytes(b"not torch")
    with pytest.raises(EncoderError, match="cannot be read"):
        load(tmp_path / "mae.pth")


# --- a whole run ---


@pytest.mark.parametrize("form", ["encoder", "full"])
def test_a_run_starts_from_an_official_file(tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form], tmp_path / "mae.pth")
    encoder = {
        "source": "file",
        "path": str(tmp_path / "mae.pth"),
        "name": VIT,
        "image_size_px": 24,
        "options": TINY,
    }
    config = tiny_config("linear_probe", encoder=encoder)
    data, out = write_archive(tmp_path / "squares.zip"), tmp_path / "run"
    with pytest.raises(EncoderError, match="not allowed here"):
        ctune.run(config, data, out)
    result = ctune.run(config, data, out, allow_noncommercial_weights=True)
    assert 0 <= result["evaluation"]["after"]["knn"]["top1"] <= 1
    assert read_info(out / "model").licence == "cc-by-nc-4.0"
    card = (out / "model" / "README.md").read_text()
    assert "under cc-by-nc-4.0" in card and 'license: "cc-by-nc-4.0"' in card
    plain = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    pos_embed = resize_pos_embed(official_encoder()["pos_embed"], 6)
    wanted = official_encoder() | {"pos_embed": pos_embed}
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in wanted.items())
