import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from ctune import weights as weights_module
from ctune.backbones import Encoder, Pool, build_encoder
from ctune.encoders import FileEncoder, ModelEncoder, TimmEncoder
from ctune.errors import EncoderError

TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
VIT = "vit_tiny_patch16_224"


def scratch(name: str = VIT, pool: Pool = "auto", size_px: int = 16, **options: Any) -> Encoder:
    config = TimmEncoder(name=name, pretrained=False, image_size_px=size_px, options=options)
    return build_encoder(config, pool=pool, encoder_dir=None)


def tiny_state(**kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = timm.create_model(VIT, img_size=16, **{"num_classes": 5, **TINY, **kwargs})
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


def from_file(path: Path, state: dict[str, Tensor], **fields: Any) -> Encoder:
    save_file(state, path / "w.safetensors")
    pool = fields.pop("pool", "auto")
    given = {"name": VIT, "image_size_px": 16, "options": TINY, **fields}
    return build_encoder(
        FileEncoder(path=str(path / "w.safetensors"), **given),
        pool=pool,
        encoder_dir=None,
        allow_noncommercial_weights=True,
    )


# --- from scratch ---


def test_describes_itself() -> None:
    encoder = scratch(pool="mean", **TINY)
    assert encoder.architecture == VIT
    assert encoder.model_args == {**TINY, "img_size": 16, "global_pool": "avg"}
    assert (encoder.embed_dim, encoder.num_blocks, encoder.image_size_px) == (24, 2, 16)
    assert (encoder.mean, encoder.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert encoder.licence is None
    assert {"pos_embed", "cls_token"} <= encoder.no_weight_decay
    assert encoder(torch.zeros(3, 3, 16, 16)).shape == (3, 24)


def test_same_seed_same_weights_whatever_was_probed() -> None:
    torch.manual_seed(3)
    first = scratch(pool="mean", **TINY).state_dict()
    torch.manual_seed(3)
    plain = timm.create_model(VIT, img_size=16, num_classes=0, global_pool="avg", **TINY)
    for key, value in plain.state_dict().items():
        assert torch.equal(first[f"backbone.{key}"], value), key


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pools_as_the_paper_says(pool: Pool) -> None:
    """mean: patch tokens averaged, then LayerNorm; cls: LayerNorm, then token 0."""
    encoder = scratch(pool=pool, **TINY).eval()
    backbone: Any = encoder.backbone
    images = torch.randn(2, 3, 16, 16)
    x = backbone.pos_drop(backbone._pos_embed(backbone.patch_embed(images)))
    x = backbone.blocks(backbone.norm_pre(x))
    if pool == "mean":
        wanted = backbone.fc_norm(x[:, 1:].mean(1))
        assert isinstance(backbone.norm, torch.nn.Identity)
    else:
        wanted = backbone.norm(x)[:, 0]
    torch.testing.assert_close(encoder(images), wanted)


def test_drop_path_is_random_in_training_only_and_not_part_of_the_model() -> None:
    config = TimmEncoder(name=VIT, pretrained=False, image_size_px=16, options=TINY)
    torch.manual_seed(0)
    encoder = build_encoder(config, pool="mean", encoder_dir=None, drop_path=0.5)
    assert "drop_path_rate" not in encoder.model_args
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    torch.manual_seed(0)
    plain = build_encoder(config, pool="mean", encoder_dir=None).eval()
    assert torch.equal(encoder(images), plain(images))


@pytest.mark.parametrize(
    ("name", "size_px", "options"),
    [
        ("resnet18", 32, {}),
        ("convnext_atto", 32, {}),
        ("mobilenetv3_small_050", 32, {}),
        ("swin_tiny_patch4_window7_224", 224, {"depths": [1, 1, 1, 1], "embed_dim": 12}),
        ("eva02_tiny_patch14_224", 28, {"depth": 1}),
        ("vit_base_patch16_siglip_224", 32, {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_other_families(name: str, size_px: int, options: dict[str, Any]) -> None:
    encoder = scratch(name, "auto", size_px, **options).eval()
    assert encoder(torch.zeros(2, 3, size_px, size_px)).shape == (2, encoder.embed_dim)


def test_cnn_keeps_its_own_pooling() -> None:
    encoder = scratch("resnet18", "cls", 32)
    assert encoder.model_args == {}


# --- what cannot be built ---


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"name": "vit_tinny"}, "unknown_encoder", "vit_tinny"),
        ({"name": f"{VIT}.nope"}, "unknown_weights", "'nope'"),
        ({"options": {"foo": 1, "depth": 2, "bar": 2}}, "unknown_option", "foo, bar"),
        ({"options": {"img_size": 8}}, "unknown_option", "set image_size_px instead"),
        ({"options": {"global_pool": "avg"}}, "unknown_option", "pool instead"),
        ({"options": {"checkpoint_path": "/x.pth"}}, "unknown_option", "checkpoint_path"),
        ({"options": {"pretrained_cfg": {"file": "/x"}}}, "unknown_option", "pretrained_cfg"),
        ({"options": {"num_heads": 5}}, "invalid_options", "divisible"),
        ({"options": {"depth": "many"}}, "invalid_options", "many"),
        ({"image_size_px": 30}, "size_not_multiple_of_patch", "30.*16"),
    ],
)
def test_says_what_is_wrong(fields: dict[str, Any], code: str, said: str) -> None:
    config = TimmEncoder(**{"name": VIT, "pretrained": False, **fields})
    with pytest.raises(EncoderError, match=said) as caught:
        build_encoder(config, pool="auto", encoder_dir=None)
    assert caught.value.error_code == code
    assert caught.value.hint


def test_cls_needs_a_class_token() -> None:
    with pytest.raises(EncoderError, match="no class token") as caught:
        scratch(pool="cls", **TINY, class_token=False)
    assert caught.value.error_code == "no_class_token"


def test_mean_pooling_needs_no_class_token() -> None:
    encoder = scratch(pool="mean", **TINY, class_token=False)
    assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 24)


def test_pooling_that_the_architecture_refuses() -> None:
    with pytest.raises(EncoderError, match="distillation") as caught:
        scratch("deit_tiny_distilled_patch16_224", "mean", 32)
    assert caught.value.error_code == "invalid_options"


def test_drop_path_where_there_is_none() -> None:
    config = TimmEncoder(name="vgg11", pretrained=False)
    with pytest.raises(EncoderError, match="no stochastic depth"):
        build_encoder(config, pool="auto", encoder_dir=None, drop_path=0.1)


# --- published weights ---


def test_published_weights_are_loaded_and_their_licence_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {
        key: torch.randn_like(value)
        for key, value in timm.create_model("resnet18").state_dict().items()
        if value.is_floating_point()
    }
    state = {**timm.create_model("resnet18").state_dict(), **state}
    asked = []

    def download(repo: str, filename: str) -> str:
        asked.append((repo, filename))
        save_file(state, tmp_path / "w.safetensors")
        return str(tmp_path / "w.safetensors")

    monkeypatch.setattr(weights_module, "hf_hub_download", download)
    config = TimmEncoder(name="resnet18.a1_in1k")
    encoder = build_encoder(config, pool="auto", encoder_dir=None)
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors")]
    assert encoder.licence == "apache-2.0"
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_weights_that_forbid_commercial_use_need_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, filename: str) -> str:
        raise LocalEntryNotFoundError(f"no {repo}")

    monkeypatch.setattr(weights_module, "hf_hub_download", fail)
    config = TimmEncoder(name="vit_base_patch16_224.mae")
    with pytest.raises(EncoderError, match="under licence cc-by-nc") as caught:
        build_encoder(config, pool="auto", encoder_dir=None)
    assert caught.value.error_code == "noncommercial_weights"
    with pytest.raises(EncoderError, match=r"no timm/vit_base_patch16_224\.mae"):
        build_encoder(config, pool="auto", encoder_dir=None, allow_noncommercial_weights=True)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, filename: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(weights_module, "hf_hub_download", fail)
    with pytest.raises(EncoderError, match="no connection") as caught:
        build_encoder(TimmEncoder(name=VIT), pool="auto", encoder_dir=None)
    assert caught.value.error_code == "weights_unavailable"
    assert "source 'file'" in caught.value.hint


def test_weights_that_are_published_only_as_pickles_are_not_loaded() -> None:
    with pytest.raises(EncoderError, match="no published weights") as caught:
        build_encoder(TimmEncoder(name="gcvit_tiny.in1k"), pool="auto", encoder_dir=None)
    assert caught.value.error_code == "weights_unavailable"


# --- weights from a file ---


def test_file_gives_every_weight_and_pools_as_it_was_trained(tmp_path: Path) -> None:
    for pooling, kept in (("token", "norm.weight"), ("avg", "fc_norm.weight")):
        state = tiny_state(global_pool=pooling)
        encoder = from_file(tmp_path, state)
        assert encoder.model_args["global_pool"] == pooling
        assert encoder.licence == "unknown"
        loaded = encoder.backbone.state_dict()
        assert kept in loaded
        assert loaded.keys() == state.keys() - {"head.weight", "head.bias"}
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_switched_pooling_starts_its_norm_fresh(tmp_path: Path) -> None:
    encoder = from_file(tmp_path, tiny_state(global_pool="token"), pool="mean")
    norm: Any = encoder.backbone.fc_norm
    assert torch.equal(norm.weight, torch.ones(24))
    assert torch.equal(norm.bias, torch.zeros(24))


@pytest.mark.parametrize("prefix", ["encoder.", "module.", "module.encoder."])
def test_wrapped_and_masked_autoencoder_files(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in tiny_state().items()}
    state["mask_token"] = torch.zeros(1, 1, 8)
    state["decoder_embed.weight"] = torch.zeros(8, 24)
    assert from_file(tmp_path, state).embed_dim == 24


def test_other_size_resamples_positions(tmp_path: Path) -> None:
    encoder = from_file(tmp_path, tiny_state(), image_size_px=32)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_nothing_is_left_out_silently(tmp_path: Path, change: str) -> None:
    state = tiny_state()
    if change == "missing":
        del state["blocks.1.norm1.weight"], state["cls_token"]
    else:
        state |= {"blocks.7.norm1.weight": torch.zeros(24), "surprise": torch.zeros(1)}
    with pytest.raises(EncoderError, match=change) as caught:
        from_file(tmp_path, state)
    assert caught.value.error_code == "weights_mismatch"
    listed = {
        "missing": ["blocks.1.norm1.weight", "cls_token"],
        "left over": ["blocks.7.norm1.weight", "surprise"],
    }
    assert all(key in caught.value.message for key in listed[change])


def test_norm_is_missed_when_the_pooling_was_not_switched(tmp_path: Path) -> None:
    state = tiny_state(global_pool="token")
    del state["norm.weight"]
    with pytest.raises(EncoderError, match=r"norm\.weight"):
        from_file(tmp_path, state)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="size mismatch for cls_token") as caught:
        from_file(tmp_path, tiny_state(), options={**TINY, "embed_dim": 48})
    assert caught.value.error_code == "weights_mismatch"


def test_beit_position_information_follows_the_file(tmp_path: Path) -> None:
    name, size_px = "beit_base_patch16_224", 32
    options: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    flags: dict[str, Any] = {
        "use_abs_pos_emb": True,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    }
    model = timm.create_model(name, img_size=size_px, **options, **flags)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    encoder = from_file(
        tmp_path, state, name=name, image_size_px=size_px, options=options, pool="auto"
    )
    assert {key: encoder.model_args[key] for key in flags} == flags


@pytest.mark.parametrize(("suffix", "code"), [("pth", "checkpoint_format"), ("bin", "weights_un")])
def test_torch_files_of_other_encoders_are_not_loaded(
    tmp_path: Path, suffix: str, code: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    torch.save(tiny_state(), path)
    with pytest.raises(EncoderError, match=r"cannot be read|not a checkpoint") as caught:
        build_encoder(FileEncoder(path=str(path), name=VIT), pool="auto", encoder_dir=None)
    assert caught.value.error_code.startswith(code)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (FileEncoder(path="/does/not/exist.safetensors", name=VIT), "weights_unreadable"),
        (FileEncoder(path="/does/not/exist.safetensors"), "unknown_encoder"),
        (FileEncoder(path="/"), "weights_unreadable"),
        (ModelEncoder(id="mdl_x"), "no_model"),
    ],
)
def test_no_such_file(config: FileEncoder | ModelEncoder, code: str) -> None:
    with pytest.raises(EncoderError) as caught:
        build_encoder(config, pool="auto", encoder_dir=None)
    assert caught.value.error_code == code


def test_preprocess_and_config_files_stay_free_of_torch() -> None:
    code = "import sys, ctune.model_dir, ctune.model_card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
