"""Supervised contrastive loss (SupCon, "out" form), NT-Xent, and their form split over ranks.

Sources: Khosla et al., arXiv 2004.11362, Eq. 2; Chen et al., arXiv 2002.05709, Eq. 1; the factor
temperature / base_temperature and the mean over anchors follow HobbitLong/SupContrast,
``losses.py``, as does LaCViT (arXiv 2303.18013), whose paper writes a sum without the factor.

Deviation from that code: it subtracts the row maximum *including* the anchor's similarity with
itself and then deletes that entry, so below a temperature of about 0.02 everything that is left can
underflow to log(0). Here the anchor itself is removed first and the rest is one log-sum-exp.

Letters: B images, V views per image, d feature dimensions, b images of this rank, n = b*V or b
anchors, m = B*V contrast views. Flattened views are image-major: view v of image i is row i*V + v.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ctune.unit_length import unit_length

ContrastMode = Literal["all", "one"]
NoPositive = Literal["zero", "skip", "raise"]

# An anchor whose weights sum to less has no positive (HobbitLong/SupContrast, losses.py).
MIN_POSITIVE_WEIGHT = 1e-6


def supervised_contrastive_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.1,
    base_temperature: float | None = 0.07,
    contrast_mode: ContrastMode = "all",
    no_positive: NoPositive = "zero",
) -> Tensor:
    """Mean SupCon loss over the anchors: arXiv 2004.11362, Eq. 2, times temperature / base.

    Features are used as given: normalise them before. Half precision is computed in float32,
    whatever autocast says; float64 stays float64.

    Args:
        features: [B, V, d] views of B images.
        labels: [B] integer class of each image; views of images of one class are positives.
        mask: [B, B] weight of image j's views as positives of image i's, >= 0, may be asymmetric
            and fractional. Only the anchor's own view is removed from it. With neither labels nor
            mask the positives are the other views of the same image (NT-Xent).
        temperature: divides the similarities.
        base_temperature: the loss is multiplied by temperature / base_temperature; None: factor 1.
        contrast_mode: "all": every view is an anchor; "one": only the first of each image. All
            views are contrast either way.
        no_positive: an anchor without a positive contributes zero and counts in the mean ("zero",
            as in SupContrast), is left out of the mean ("skip"), or is an error ("raise").

    Returns:
        Scalar loss, float32 or float64.

    Raises:
        ValueError: features not floating [B, V, d] with B >= 2; labels not [B] integers; both
            labels and mask; mask not [B, B] with finite entries >= 0; a temperature not positive;
            an unknown mode; no anchor with a positive; or one without under "raise".
    """
    _check_features(features, "features")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask are both given; give one, the mask replaces the labels")
    B = features.shape[0]
    if mask is not None:
        weights = _check_mask(mask, B)
    else:
        weights = _same_label(_labels_or_images(labels, B, features, "labels"))
    return _contrastive_loss(
        features,
        features,
        weights,
        image_offset=0,
        factor=_loss_factor(temperature, base_temperature),
        temperature=temperature,
        contrast_mode=contrast_mode,
        no_positive=no_positive,
    )


def nt_xent_loss(
    features: Tensor,
    *,
    temperature: float,
    base_temperature: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """NT-Xent (arXiv 2002.05709, Eq. 1): SupCon where the positives are the image's other views.

    Args:
        features: [B, V, d].
        temperature: divides the similarities.
        base_temperature: as in ``supervised_contrastive_loss``; None: factor 1, as in SimCLR.
        normalize: scale the features to unit length first, in float32 at least; else they are used
            as given.

    Returns:
        Scalar loss, float32 or float64.

    Raises:
        ValueError: as ``supervised_contrastive_loss``; V = 1 leaves no anchor with a positive.
    """
    if normalize:
        features = unit_length(features)
    return supervised_contrastive_loss(
        features, temperature=temperature, base_temperature=base_temperature
    )


def supervised_contrastive_loss_sharded(
    features_local: Tensor,
    labels_local: Tensor | None,
    contrast_features: Tensor,
    contrast_labels: Tensor | None,
    image_offset: int,
    *,
    temperature: float = 0.1,
    base_temperature: float | None = 0.07,
    contrast_mode: ContrastMode = "all",
) -> Tensor:
    """SupCon of one rank's anchors against the views gathered from all ranks.

    The mean over equally sized ranks is ``supervised_contrastive_loss`` of the global batch, and so
    is the mean of the ranks' gradients when ``contrast_features`` was gathered with gradient: do
    not multiply by the world size. Labels of None on both sides give NT-Xent.

    Args:
        features_local: [b, V, d] this rank's images, the anchors.
        labels_local: [b] integers, or None.
        contrast_features: [B, V, d] all images, this rank's among them.
        contrast_labels: [B] integers, or None.
        image_offset: place of this rank's first image among the B.
        temperature: divides the similarities.
        base_temperature: as in ``supervised_contrastive_loss``.
        contrast_mode: as in ``supervised_contrastive_loss``.

    Returns:
        Scalar mean over the local anchors; an anchor without a positive contributes zero.

    Raises:
        ValueError: as ``supervised_contrastive_loss`` for the contrast set (so on every rank
            alike); the local images or labels are not the contrast set's at ``image_offset``.
    """
    _check_features(contrast_features, "contrast_features")
    _check_features(features_local, "features_local", min_images=1)
    everyone, here = _shard_labels(
        features_local, labels_local, contrast_features, contrast_labels, image_offset
    )
    return _contrastive_loss(
        features_local,
        contrast_features,
        here[:, None] == everyone[None, :],
        image_offset=image_offset,
        factor=_loss_factor(temperature, base_temperature),
        temperature=temperature,
        contrast_mode=contrast_mode,
        no_positive=None,
    )


def simplex_supcon_loss(
    num_classes: int,
    samples_per_class: int,
    *,
    num_views: int,
    temperature: float,
    base_temperature: float | None,
) -> float:
    """The least SupCon loss of a balanced batch on the unit sphere: the regular simplex's.

    With P classes and m = samples_per_class * num_views views each it is
    (temperature / base) * log((m-1) + (P-1) m exp(-P / ((P-1) temperature))). Source: Graf et al.
    2021, arXiv 2102.08817, Theorem 2; attained when P <= d + 1.

    Raises:
        ValueError: a count below 1, a class with a single view, a temperature not positive.
    """
    counts = {
        "num_classes": num_classes,
        "samples_per_class": samples_per_class,
        "num_views": num_views,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    P, m = num_classes, samples_per_class * num_views
    if m < 2:
        raise ValueError("samples_per_class * num_views is 1: no view has a positive; use 2 views")
    factor = _loss_factor(temperature, base_temperature)
    if P == 1:
        return factor * math.log(m - 1)
    return factor * math.log((m - 1) + (P - 1) * m * math.exp(-P / ((P - 1) * temperature)))


def _contrastive_loss(
    features: Tensor,
    contrast: Tensor,
    image_weights: Tensor,
    *,
    image_offset: int,
    factor: float,
    temperature: float,
    contrast_mode: ContrastMode,
    no_positive: NoPositive | None,
) -> Tensor:
    """Loss of ``features`` [b, V, d] against ``contrast`` [B, V, d] with ``image_weights`` [b, B].

    ``image_offset`` is the place of the first anchor image in the contrast set. With
    ``no_positive`` None the caller has made sure that the whole batch has positives.
    """
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"contrast_mode is {contrast_mode!r}; use 'all' or 'one'")
    if no_positive not in ("zero", "skip", "raise", None):
        raise ValueError(f"no_positive is {no_positive!r}; use 'zero', 'skip' or 'raise'")
    b, V, d = features.shape
    anchor_views = V if contrast_mode == "all" else 1
    image = torch.arange(b, device=features.device).repeat_interleave(anchor_views)
    view = torch.arange(anchor_views, device=features.device).repeat(b)
    own_column = (image + image_offset) * V + view
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=features.device.type, enabled=False):
        anchors = features[:, :anchor_views].reshape(-1, d).to(dtype)
        per_anchor, positive_weight = _anchor_losses(
            anchors,
            contrast.reshape(-1, d).to(dtype),
            _view_weights(image_weights.to(dtype), own_column, anchor_views, V),
            own_column,
            temperature,
        )
        has_positive = positive_weight >= MIN_POSITIVE_WEIGHT
        per_anchor = torch.where(has_positive, per_anchor, torch.zeros_like(per_anchor))
        if no_positive is not None:
            _check_positives(has_positive, no_positive)
        if no_positive == "skip":
            return factor * per_anchor.sum() / has_positive.sum()
        return factor * per_anchor.mean()


def _anchor_losses(
    anchors: Tensor, contrast: Tensor, weights: Tensor, own_column: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Per-anchor loss [n] without the temperature factor, and the sum of its weights [n].

    anchors [n, d], contrast [m, d], weights [n, m] (0 at ``own_column``), own_column [n].
    """
    logits = anchors @ contrast.T / temperature
    minus_infinity = torch.full_like(own_column, -math.inf, dtype=logits.dtype)
    log_partition = logits.scatter(1, own_column[:, None], minus_infinity[:, None]).logsumexp(1)
    total = weights.sum(1)
    safe_total = torch.where(total >= MIN_POSITIVE_WEIGHT, total, torch.ones_like(total))
    return log_partition - (weights * logits).sum(1) / safe_total, total


def _view_weights(image_weights: Tensor, own_column: Tensor, anchor_views: int, V: int) -> Tensor:
    """Expand [b, B] weights of images to [n, m] weights of views, the anchor's own view at 0."""
    weights = image_weights.repeat_interleave(anchor_views, 0).repeat_interleave(V, 1)
    return weights.scatter(1, own_column[:, None], 0.0)


def _shard_labels(
    features_local: Tensor,
    labels_local: Tensor | None,
    contrast_features: Tensor,
    contrast_labels: Tensor | None,
    image_offset: int,
) -> tuple[Tensor, Tensor]:
    """Check that the local images lie in the contrast set; labels [B] of all and [b] of these."""
    B, b = contrast_features.shape[0], features_local.shape[0]
    if features_local.shape[1:] != contrast_features.shape[1:]:
        raise ValueError(
            f"features_local has [V, d] = {list(features_local.shape[1:])} but contrast_features "
            f"{list(contrast_features.shape[1:])}; gather the same tensor on every rank"
        )
    if not 0 <= image_offset <= B - b:
        raise ValueError(
            f"image_offset is {image_offset}, but {b} local images of {B} need an offset in "
            f"[0, {B - b}]; use rank * {b}"
        )
    if (labels_local is None) != (contrast_labels is None):
        raise ValueError("labels_local and contrast_labels must both be given or both be None")
    everyone = _labels_or_images(contrast_labels, B, contrast_features, "contrast_labels")
    here = everyone[image_offset : image_offset + b]
    if labels_local is not None:
        given = _labels_or_images(labels_local, b, features_local, "labels_local")
        if not torch.equal(given, here):
            raise ValueError(
                f"labels_local differs from contrast_labels at image_offset {image_offset}; "
                "gather labels and features in the same rank order"
            )
    if contrast_features.shape[1] == 1:
        _check_any_positive(_same_label(everyone), torch.arange(B, device=everyone.device))
    return everyone, here


def _loss_factor(temperature: float, base_temperature: float | None) -> float:
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be a positive number, 0.1 is usual")
    return 1.0 if base_temperature is None else temperature / base_temperature


def _check_features(features: Tensor, name: str, *, min_images: int = 2) -> None:
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape[1:]:
        raise ValueError(
            f"{name} has shape {list(features.shape)} and dtype {features.dtype}; it must be "
            "floating point [B, V, d]: images, views, dimensions"
        )
    if features.shape[0] < min_images:
        raise ValueError(
            f"{name} holds {features.shape[0]} images; a contrast needs at least {min_images}, "
            "raise the batch size or drop the last short batch"
        )


def _labels_or_images(labels: Tensor | None, count: int, features: Tensor, name: str) -> Tensor:
    """Labels [count] on the features' device; without labels every image is its own class."""
    if labels is None:
        return torch.arange(count, device=features.device)
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not integer or labels.shape[0] != count:
        raise ValueError(
            f"{name} has shape {list(labels.shape)} and dtype {labels.dtype}; it must hold "
            f"{count} integers, one class per image"
        )
    return labels.to(features.device)


def _same_label(labels: Tensor) -> Tensor:
    return labels[:, None] == labels[None, :]


def _check_mask(mask: Tensor, count: int) -> Tensor:
    if mask.shape != (count, count):
        raise ValueError(
            f"mask has shape {list(mask.shape)}; it must be [{count}, {count}], one weight per "
            "pair of images"
        )
    if not bool(torch.isfinite(mask).all()) or bool((mask < 0).any()):
        raise ValueError("mask holds a negative or non-finite weight; weights must be >= 0")
    return mask


def _check_any_positive(weights: Tensor, own_column: Tensor) -> None:
    has_positive = weights.scatter(1, own_column[:, None], False).any(1)
    _check_positives(has_positive, "zero")


def _check_positives(has_positive: Tensor, no_positive: NoPositive) -> None:
    """Refuse a batch whose anchors [n] all lack a positive, or with "raise" any that does."""
    missing = int((~has_positive).sum())
    if missing == has_positive.numel():
        raise ValueError(
            f"none of the {missing} anchors has a positive; use at least two views per image or "
            "a class-balanced sampler with at least two images per class"
        )
    if missing and no_positive == "raise":
        raise ValueError(
            f"{missing} of {has_positive.numel()} anchors have no positive and no_positive is "
            "'raise'; use two views, a class-balanced sampler, or no_positive='zero'"
        )
