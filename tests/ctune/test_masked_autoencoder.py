"""Invariants of mae.md 7 of the model, over plain timm."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ctune.masked_autoencoder import MaskedAutoencoder
from ctune.patches import patchify, unpatchify
from ctune.position_embedding import get_2d_sincos_pos_embed

SIDE, PATCH, LENGTH = 16, 4, 16


def vit(**changes: Any) -> VisionTransformer:
    options: dict[str, Any] = {
        "img_size": SIDE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "num_classes": 0, "global_pool": "token", **changes,
    }  # fmt: skip
    return VisionTransformer(**options)


def model(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3, **changes}
    made = MaskedAutoencoder(vit(), **decoder)
    made.initialise_encoder()
    return made


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def noise(count: int = 3) -> Tensor:
    return torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(2))


def test_the_blocks_see_the_class_token_and_the_visible_patches_alone() -> None:
    made, seen = model(), []
    made.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    made.decoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    made(images(), 0.75)
    assert seen == [(3, 1 + 4, 16), (3, 1 + 16, 12)]


def test_removed_pixels_have_no_influence_on_the_encoder() -> None:
    made, imgs = model().eval(), images()
    first = made.encode(imgs, 0.75, noise=noise())
    patches = patchify(imgs, PATCH)
    changed = torch.where(first.mask[..., None] == 1, patches + 5, patches)
    second = made.encode(unpatchify(changed, PATCH), 0.75, noise=noise())
    assert torch.equal(first.visible, second.visible)
    changed = torch.where(first.mask[..., None] == 0, patches + 5, patches)
    third = made.encode(unpatchify(changed, PATCH), 0.75, noise=noise())
    assert not torch.allclose(first.visible, third.visible)


def test_another_order_of_the_kept_patches_reorders_what_the_encoder_says() -> None:
    made, imgs, first = model().eval(), images(1), noise(1)
    kept = first.argsort(dim=1)[0, :4]
    second = first.clone()
    second[0, kept] = first[0, kept.flip(0)]
    one = made.encode(imgs, 0.75, noise=first).visible
    other = made.encode(imgs, 0.75, noise=second).visible
    torch.testing.assert_close(other[:, :1], one[:, :1])
    torch.testing.assert_close(other[:, 1:], one[:, 1:].flip(1))


def test_with_everything_visible_it_is_plain_timm() -> None:
    made, imgs = model().eval(), images()
    expected = made.encoder.forward_features(imgs)
    found = made.encode(imgs, 0.0, noise=noise())
    torch.testing.assert_close(found.visible[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    order = found.ids_restore[..., None].expand(-1, -1, 16)
    patches = found.visible[:, 1:].gather(1, order)
    torch.testing.assert_close(patches, expected[:, 1:], rtol=0, atol=1e-5)


def test_position_tables_are_those_of_the_grid_and_are_not_trained() -> None:
    made = model()
    tables = {name: p for name, p in made.named_parameters() if name.endswith("pos_embed")}
    assert len(tables) == 2
    for table in tables.values():
        expected = get_2d_sincos_pos_embed(table.shape[2], 4, cls_token=True)
        assert np.allclose(table[0].detach().numpy(), expected)
    before = {name: table.clone() for name, table in tables.items()}
    made.train_all()
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    made(images(), 0.5).loss.backward()
    optimizer.step()
    for name, table in tables.items():
        assert table.grad is None
        assert torch.equal(table, before[name])
    assert all(p.grad is not None for p in trained)


@torch.no_grad()
def test_a_start_from_scratch_is_xavier_with_fused_attention_as_one_matrix() -> None:
    made = MaskedAutoencoder(
        vit(embed_dim=64), decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2
    )
    made.initialise_encoder()
    for qkv in map(made.get_submodule, ("encoder.blocks.1.attn.qkv", "decoder.blocks.0.attn.qkv")):
        assert isinstance(qkv, nn.Linear)
        bound = (6 / (64 + 3 * 64)) ** 0.5
        assert 0.95 * bound < float(qkv.weight.detach().abs().max()) <= bound
        assert not qkv.bias.any()
    bound = (6 / (64 + 48)) ** 0.5
    assert 0.95 * bound < float(made.encoder.patch_embed.proj.weight.abs().max()) <= bound
    assert made.encoder.patch_embed.proj.bias.any(), "the convolution's own default stays"
    for token in (made.encoder.cls_token, made.decoder.mask_token):
        assert token is not None
        assert 0.01 < float(token.std()) < 0.03


def test_a_given_encoder_keeps_its_weights() -> None:
    encoder = vit()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    made = MaskedAutoencoder(encoder, 12, decoder_depth=1, decoder_num_heads=3)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert made.encoder_state_dict().keys() == before.keys()


def test_the_encoder_is_a_timm_state_dict_with_the_same_features() -> None:
    made = model().eval()
    plain = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=SIDE, patch_size=PATCH, embed_dim=16,
        depth=2, num_heads=2,
    )  # fmt: skip
    plain.load_state_dict(made.encoder_state_dict(), strict=True)
    found = made.encode(images(), 0.0).visible[:, 0]
    torch.testing.assert_close(plain.eval()(images()), found, rtol=0, atol=1e-5)


def test_official_names_load_and_unknown_ones_do_not() -> None:
    made, other = model(), model()
    official = {}
    for name, value in made.state_dict().items():
        module, _, rest = name.partition(".")
        own = rest if module == "encoder" or rest == "mask_token" else f"decoder_{rest}"
        official[own] = value + 1
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"} <= official.keys()
    other.load_official_state_dict(official)
    loaded = other.state_dict()
    assert all(torch.equal(loaded[name], value + 1) for name, value in made.state_dict().items())
    with pytest.raises(RuntimeError, match=r"decoder\.surprise"):
        other.load_official_state_dict({**official, "decoder_surprise": torch.ones(1)})


def test_gradient_checkpointing_changes_nothing() -> None:
    made = model().train()
    gradients = []
    for wanted in (False, True):
        made.encoder.set_grad_checkpointing(wanted)
        made.zero_grad()
        made(images(), 0.75, noise()).loss.backward()
        gradients.append([p.grad for p in made.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: vit(class_token=False, global_pool="avg"), "must have a class token"),
        (lambda: vit(reg_tokens=1), "no register tokens"),
        (lambda: vit(no_embed_class=True), "row for the class token"),
        (lambda: vit(img_size=(16, 8)), "square"),
        (lambda: vit(pre_norm=True), "nothing between"),
        (lambda: vit(global_pool="avg"), "normalise its tokens"),
        (lambda: nn.Linear(2, 2), "no plain vision transformer"),
    ],
)
def test_encoders_whose_patches_cannot_be_dropped_are_refused(encoder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(encoder(), 12, decoder_depth=1, decoder_num_heads=3)


def test_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of its 5 heads"):
        model(decoder_num_heads=5)
    with pytest.raises(ValueError, match="multiple of 4"):
        model(decoder_embed_dim=18, decoder_num_heads=2)
    with pytest.raises(ValueError, match="removes none of 16 patches"):
        model()(images(), 0.0)
    with pytest.raises(ValueError, match=r"\(3, 16, 12\)"):
        model()(images()[..., :12], 0.75)
    with pytest.raises(ValueError, match=r"\(1, 16, 16\)"):
        model()(images()[:, :1], 0.75)
    with pytest.raises(ValueError, match="leaves none of 16 patches"):
        model()(images(), 0.95)
    odd = MaskedAutoencoder(vit(embed_dim=18), 12, decoder_depth=1, decoder_num_heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        odd.initialise_encoder()
