"""A masked autoencoder (arXiv 2111.06377) over a plain timm vision transformer (mae.md 2).

Letters: N images, C channels, p side of a patch in pixels, L patches in row-major order, d = p²C
values of a patch, K visible patches, D and D_d width of encoder and decoder.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.models._manipulate import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ctune.patches import (
    Masked,
    mae_reconstruction_loss,
    num_visible,
    random_masking,
    restore_masked_tokens,
)
from ctune.position_embedding import get_2d_sincos_pos_embed

NORM_EPS = 1e-6
TOKEN_STD = 0.02
POSITION_TABLES = ("encoder.pos_embed", "decoder.pos_embed")


class Decoder(nn.Module):
    """From the tokens of the visible patches to the pixels of all patches.

    Args:
        encoder_dim: D.
        num_values: d.
        grid_size: patches as (rows, columns).
        embed_dim: D_d, a multiple of 4 and of num_heads.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the blocks' MLPs over D_d.

    Raises:
        ValueError: D_d is no multiple of 4 or of num_heads.
    """

    def __init__(
        self,
        encoder_dim: int,
        num_values: int,
        *,
        grid_size: tuple[int, int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"decoder width {embed_dim} is no multiple of its {num_heads} heads")
        table = get_2d_sincos_pos_embed(embed_dim, grid_size, cls_token=True)
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, *table.shape), requires_grad=False)
        norm: Any = functools.partial(nn.LayerNorm, eps=NORM_EPS)
        blocks = [
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(embed_dim)
        self.pred = nn.Linear(embed_dim, num_values)
        initialise(self)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        with torch.no_grad():
            self.pos_embed.copy_(torch.from_numpy(table))

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Return the predicted patches [N, L, d].

        Args:
            latent: [N, 1 + K, D], class token first.
            ids_restore: [N, L].
        """
        x = restore_masked_tokens(self.embed(latent), self.mask_token, ids_restore)
        x = self.norm(self.blocks(x + self.pos_embed))
        pred: Tensor = self.pred(x)[:, 1:]
        return pred


class Reconstruction(NamedTuple):
    """Result of `MaskedAutoencoder`."""

    loss: Tensor
    pred: Tensor
    """[N, L, d]: all patches as the decoder sees them."""
    mask: Tensor
    """[N, L]: 1 where a patch was removed."""
    ids_restore: Tensor
    """[N, L] int64."""
    latent: Tensor
    """[N, 1 + K, D]: tokens of the encoder after its norm."""


class MaskedAutoencoder(nn.Module):
    """An encoder that sees part of an image's patches, and a decoder that fills in the others.

    The encoder's parameters stay timm's; its position embedding is not trained. Its weights are
    left as they are; `initialise_encoder` makes those of a start from scratch.

    Args:
        encoder: a vision transformer with a class token; pooling and head are not used.
        decoder_embed_dim: D_d.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        mlp_ratio: of the decoder.
        norm_pix_loss: see `mae_reconstruction_loss`.

    Raises:
        ValueError: an encoder that this does not fit, as `check_encoder`; as `Decoder`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder_embed_dim: int,
        *,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = check_encoder(encoder)
        projection = self.encoder.patch_embed.proj
        self.patch_size = int(projection.kernel_size[0])
        self.grid_size: tuple[int, int] = tuple(self.encoder.patch_embed.grid_size)
        self.norm_pix_loss = norm_pix_loss
        self.decoder = Decoder(
            self.encoder.embed_dim,
            self.patch_size**2 * projection.in_channels,
            grid_size=self.grid_size,
            embed_dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
        )
        self.train_all()

    @property
    def _positions(self) -> nn.Parameter:
        """[1, 1 + L, D]."""
        table: nn.Parameter = self.encoder.pos_embed  # type: ignore[assignment]
        return table

    @property
    def _class_token(self) -> nn.Parameter:
        """[1, 1, D]."""
        token: nn.Parameter = self.encoder.cls_token  # type: ignore[assignment]
        return token

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid_size[0] * self.grid_size[1]

    def train_all(self) -> None:
        """Let everything be trained but the position tables."""
        self.requires_grad_(True)
        for table in (self._positions, self.decoder.pos_embed):
            table.requires_grad_(False)

    def initialise_encoder(self) -> None:
        """Give the encoder the weights of a start from scratch (mae.md 2.7), by torch's generator.

        Raises:
            ValueError: its width is no multiple of 4.
        """
        encoder = self.encoder
        table = get_2d_sincos_pos_embed(encoder.embed_dim, self.grid_size, cls_token=True)
        initialise(encoder)
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(encoder.embed_dim, -1))
        nn.init.normal_(self._class_token, std=TOKEN_STD)
        with torch.no_grad():
            self._positions.copy_(torch.from_numpy(table))

    def encode(self, imgs: Tensor, mask_ratio: float, *, noise: Tensor | None = None) -> Masked:
        """Return `encode_visible` of the encoder."""
        return encode_visible(self.encoder, imgs, mask_ratio, noise=noise)

    def forward(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> Reconstruction:
        """Return loss, prediction and tokens of normalised images [N, C, H, W].

        Args:
            imgs: of the encoder's size.
            mask_ratio: share of the patches that are removed.
            noise: [N, L]; None: from torch's global generator.

        Raises:
            ValueError: nothing or everything would be removed; as `encode`.
        """
        if num_visible(self.num_patches, mask_ratio) == self.num_patches:
            raise ValueError(
                f"a mask_ratio of {mask_ratio} removes none of {self.num_patches} patches; raise it"
            )
        latent, mask, ids_restore = self.encode(imgs, mask_ratio, noise=noise)
        pred = self.decoder(latent, ids_restore)
        loss = mae_reconstruction_loss(
            imgs, pred, mask, self.patch_size, norm_pix_loss=self.norm_pix_loss
        )
        return Reconstruction(loss, pred, mask, ids_restore, latent)

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Return the encoder's weights under timm's names."""
        return dict(self.encoder.state_dict())

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights under the flat names of facebookresearch/mae.

        The two position tables may be missing: they follow from the grid.

        Raises:
            RuntimeError: as torch's `load_state_dict`: missing or unknown names, other shapes.
        """
        named = {_own_name(name): value for name, value in state_dict.items()}
        own = self.state_dict()
        self.load_state_dict({name: own[name] for name in POSITION_TABLES} | named)


def encode_visible(
    encoder: VisionTransformer, imgs: Tensor, mask_ratio: float, *, noise: Tensor | None = None
) -> Masked:
    """Return the encoder's tokens of the visible patches as `visible` [N, 1 + K, D].

    Removed patches never enter the blocks.

    Args:
        encoder: that `check_encoder` has accepted.
        imgs: [N, C, H, W], normalised.
        mask_ratio: share of the patches that are removed.
        noise: [N, L] that decides which; None: drawn from torch's global generator.

    Raises:
        ValueError: images of another size than the encoder's; as `random_masking`.
    """
    expected = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    if tuple(imgs.shape[1:]) != expected:
        raise ValueError(f"images of {tuple(imgs.shape[1:])}; the encoder takes {expected}")
    positions: Tensor = encoder.pos_embed  # type: ignore[assignment]
    token: Tensor = encoder.cls_token  # type: ignore[assignment]
    kept = random_masking(encoder.patch_embed(imgs) + positions[:, 1:], mask_ratio, noise=noise)
    class_token = (token + positions[:, :1]).expand(len(imgs), -1, -1)
    x = torch.cat((class_token, kept.visible), dim=1)
    if encoder.grad_checkpointing and encoder.training:
        x = checkpoint_seq(encoder.blocks, x)
    else:
        x = encoder.blocks(x)
    return kept._replace(visible=encoder.norm(x))


def _own_name(official: str) -> str:
    if official == "mask_token":
        return "decoder.mask_token"
    if official.startswith("decoder_"):
        return f"decoder.{official.removeprefix('decoder_')}"
    return f"encoder.{official}"


def initialise(module: nn.Module) -> None:
    """Start linear layers Xavier-uniform with bias 0 and norms as the identity (mae.md 2.7)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def check_encoder(encoder: nn.Module) -> VisionTransformer:
    """Return the encoder, if its patches can be dropped.

    Raises:
        ValueError: no plain timm vision transformer; no class token or more prefix tokens; no
            position table with an entry for the class token; not square; layers between position
            embedding and blocks; no final norm on tokens.
    """
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"{type(encoder).__name__} is no plain vision transformer of timm's")
    if encoder.cls_token is None or encoder.num_prefix_tokens != 1:
        raise ValueError("the encoder must have a class token and no register tokens")
    rows, columns = encoder.patch_embed.grid_size or (0, 0)
    if encoder.pos_embed is None or encoder.pos_embed.shape[1] != 1 + rows * columns:
        raise ValueError("the encoder must have a position table with a row for the class token")
    if rows != columns or encoder.dynamic_img_size:
        raise ValueError("the encoder must take square images of one size")
    between = (encoder.patch_drop, encoder.norm_pre)
    if any(not isinstance(part, nn.Identity) for part in between) or encoder.pos_drop.p:
        raise ValueError("the encoder must have nothing between position embedding and blocks")
    if isinstance(encoder.norm, nn.Identity):
        raise ValueError("the encoder must normalise its tokens before they are pooled")
    return encoder
