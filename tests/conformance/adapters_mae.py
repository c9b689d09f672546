"""Adapters of the masked autoencoder."""

from timm.models.vision_transformer import VisionTransformer

from ctune.mae_checkpoint import convert_encoder_state_dict
from ctune.masked_autoencoder import MaskedAutoencoder
from ctune.patches import (
    mae_reconstruction_loss,
    patchify,
    random_masking,
    restore_masked_tokens,
    unpatchify,
)
from ctune.position_embedding import get_2d_sincos_pos_embed, resize_pos_embed
from tests.conformance.adapters_optim import state_dict
from tests.conformance.convert import (
    Adapter,
    Case,
    integers,
    loss_and_gradient,
    options,
    tensors,
)


def _get_2d_sincos_pos_embed(inputs: Case, parameters: Case) -> Case:
    given = options(parameters)
    grid_size = given.pop("grid_size")
    side = tuple(grid_size) if isinstance(grid_size, list) else grid_size
    return {"pos_embed": get_2d_sincos_pos_embed(grid_size=side, **given).tolist()}


def _patchify(inputs: Case, parameters: Case) -> Case:
    (imgs,) = tensors(inputs, parameters, "imgs")
    return {"patches": patchify(imgs, **options(parameters)).tolist()}


def _unpatchify(inputs: Case, parameters: Case) -> Case:
    (patches,) = tensors(inputs, parameters, "patches")
    return {"imgs": unpatchify(patches, **options(parameters)).tolist()}


def _random_masking(inputs: Case, parameters: Case) -> Case:
    x, noise = tensors(inputs, parameters, "x", "noise")
    masked = random_masking(x, noise=noise, **options(parameters))
    return {
        "x_visible": masked.visible.tolist(),
        "mask": masked.mask.tolist(),
        "ids_restore": masked.ids_restore.tolist(),
    }


def _restore_masked_tokens(inputs: Case, parameters: Case) -> Case:
    x, mask_token = tensors(inputs, parameters, "x", "mask_token")
    ids_restore = integers(inputs["ids_restore"])
    restored = restore_masked_tokens(x, mask_token, ids_restore, **options(parameters))
    return {"x": restored.tolist()}


def _mae_reconstruction_loss(inputs: Case, parameters: Case) -> Case:
    imgs, pred, mask = tensors(inputs, parameters, "imgs", "pred", "mask")
    loss = mae_reconstruction_loss(imgs, pred.requires_grad_(), mask, **options(parameters))
    return loss_and_gradient(loss, pred, "grad_pred")


def _mae_forward(inputs: Case, parameters: Case) -> Case:
    imgs, noise = tensors(inputs, parameters, "imgs", "noise")
    given = options(parameters)
    mask_ratio, norm_pix_loss = given.pop("mask_ratio"), given.pop("norm_pix_loss")
    decoder = {name: given.pop(name) for name in [*given] if name.startswith("decoder_")}
    encoder = VisionTransformer(num_classes=0, global_pool="token", **given)
    model = MaskedAutoencoder(
        encoder, mlp_ratio=given["mlp_ratio"], norm_pix_loss=norm_pix_loss, **decoder
    ).to(imgs.dtype)
    model.initialise_encoder()  # for the position table, which the case leaves out
    model.load_official_state_dict(state_dict(inputs["state_dict"]))
    result = model.eval()(imgs, mask_ratio, noise)
    return {name: value.tolist() for name, value in result._asdict().items()}


def _resize_pos_embed(inputs: Case, parameters: Case) -> Case:
    (pos_embed,) = tensors(inputs, parameters, "pos_embed")
    return {"pos_embed": resize_pos_embed(pos_embed, **options(parameters)).tolist()}


def _convert_encoder_state_dict(inputs: Case, parameters: Case) -> Case:
    checkpoint = {
        nest: dict(zip(state, tensors(state, parameters, *state), strict=True))
        for nest, state in inputs["checkpoint"].items()
    }
    converted = convert_encoder_state_dict(checkpoint)
    return {"state_dict": {key: value.tolist() for key, value in converted.items()}}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("mae", "get_2d_sincos_pos_embed"): _get_2d_sincos_pos_embed,
    ("mae", "mae_forward"): _mae_forward,
    ("mae", "mae_reconstruction_loss"): _mae_reconstruction_loss,
    ("mae", "patchify"): _patchify,
    ("mae", "random_masking"): _random_masking,
    ("mae", "resize_pos_embed"): _resize_pos_embed,
    ("mae", "restore_masked_tokens"): _restore_masked_tokens,
    ("mae", "unpatchify"): _unpatchify,
    ("mae", "convert_encoder_state_dict"): _convert_encoder_state_dict,
}
