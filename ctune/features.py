"""Images and features of the splits of one run: decoded once, encoded as serving encodes them."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ctune.augment import ViewPipeline
from ctune.backbones import Encoder
from ctune.child import StopRequest
from ctune.data import ImageCache
from ctune.distributed import World
from ctune.errors import DivergedError
from ctune.evaluate.color_histogram import color_histograms
from ctune.evaluate.linear_probe import Augmented
from ctune.evaluate.subject import Histograms, LabelledFeatures
from ctune.events import EventBase, StageStarted
from ctune.manifest import Split, working_size_px
from ctune.samplers import Indices
from ctune.seeding import make_generator
from ctune.store import PackedStore
from ctune.view_presets import VIEW_PRESETS

ENCODE_PIXELS = 256 * 224**2
"""Pixels encoded at a time: 256 images of 224 px."""
ENCODE_IMAGES = 256


class RunImages:
    """The splits of a packed store as a run uses them.

    With `labelled_only`, training images without a label are left out. With several processes all
    of them make the same calls in the same order: rank 0 decodes, and each encodes its share.
    """

    def __init__(
        self,
        store: PackedStore,
        cache_dir: Path,
        *,
        labelled_only: bool,
        emit: Callable[[EventBase], None],
        stop: StopRequest,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self._store = store
        self._cache_dir = cache_dir
        self._labelled_only = labelled_only
        self._emit = emit
        self._stop = stop
        self._caches: dict[tuple[Split, int], ImageCache] = {}

    @property
    def stop(self) -> StopRequest:
        """The wish of the run's owner that it stop."""
        return self._stop

    def labels(self, split: Split) -> Indices:
        """Return the labels [N] of a split's images, -1 for none."""
        labels: Indices = self._store.labels(split)[self._used(split)]
        return labels

    def numbers(self, split: Split) -> Indices:
        """Return the numbers [N] of a split's images in the packed store."""
        numbers: Indices = self._store.indices(split)[self._used(split)]
        return numbers

    def decoded(self, split: Split, size_px: int) -> ImageCache:
        """Return a split's images, decoded at `size_px`; every image is decoded once per size."""
        key = (split, size_px)
        if key not in self._caches:
            self._emit(StageStarted(stage="caching"))
            self._caches[key] = self.world.on_main(
                lambda: ImageCache.build(
                    self._store,
                    self.numbers(split),
                    size_px,
                    self._cache_dir / f"{split}-{size_px}",
                    stop=self._stop,
                )
            )
        return self._caches[key]

    def for_training(self, image_size_px: int) -> ImageCache:
        """Return the training images at the working size of an encoder."""
        return self._for_views("train", image_size_px)

    def _for_views(self, split: Split, image_size_px: int) -> ImageCache:
        return self.decoded(split, working_size_px(self._store.manifest.summary, image_size_px))

    def encode(
        self,
        encoder: Encoder,
        split: Split,
        device: torch.device,
        *,
        positions: Indices | None = None,
    ) -> Tensor:
        """Return features h [N, D] of a split, float32 on the device, encoder in eval mode.

        With `positions` only those of some images, in this order.

        Raises:
            DivergedError: a feature is not finite.
            StopRequested: a stop was asked for.
        """
        images = self.decoded(split, encoder.image_size_px)
        batch = _batch_size(encoder)
        encoder.eval()
        wanted = np.arange(len(images)) if positions is None else positions
        starts = range(0, len(wanted), batch)  # the ranks share these: each batch stays the same
        mine = starts[self.world.share(len(starts))]
        parts = []
        with torch.no_grad():
            for turn in range(max(len(mine), -(-len(starts) // self.world.size))):
                self.world.check(self._stop)
                for start in mine[turn : turn + 1]:
                    pixels = images.batch(wanted[start : start + batch]).to(device)
                    parts.append(encoder(encoder.preprocessing.normalise(pixels)).float())
        features = torch.cat(parts)
        if len(mine) < len(starts):
            features = self.world.gather_rows(features)
        if not bool(torch.isfinite(features).all()):
            raise DivergedError(
                f"the encoder gives vectors of {split} images that are not finite",
                hint="check the encoder's weights, or lower the learning rate",
            )
        return features

    def features(self, encoder: Encoder, split: Split, device: torch.device) -> LabelledFeatures:
        """Return features and labels of a split; errors as `encode`."""
        labels = torch.from_numpy(self.labels(split)).to(device)
        return LabelledFeatures(self.encode(encoder, split, device), labels)

    def random_views(
        self,
        encoder: Encoder,
        device: torch.device,
        *,
        seed: int,
        split: Split = "train",
        preset: str = "mae_minimal",
    ) -> Augmented:
        """Return what encodes random views of a split's images, by default MAE's crop and flip.

        (rows [n] of the split, step) -> features [n, D]; a function of seed, step and rows. Where
        the preset (`ctune.view_presets`) has several views, steps take them in turn. The images are
        decoded now, at the working size.
        """
        images = self._for_views(split, encoder.image_size_px)
        configs = VIEW_PRESETS[preset](encoder.image_size_px, mean=encoder.mean, std=encoder.std)
        pipelines = [ViewPipeline(config) for config in configs]

        def encode(rows: Tensor, step: int) -> Tensor:
            self._stop.check()
            positions = rows.cpu()
            views = pipelines[step % len(pipelines)]
            drawn = views.draw(
                images.sizes(positions.numpy()),
                make_generator(seed, "probe crops", step),
                num_views=1,
            )[0]
            encoder.eval()
            parts = []
            with torch.no_grad():
                for part in torch.split(torch.arange(len(positions)), _batch_size(encoder)):
                    pixels = images.batch(positions[part].numpy()).to(device)
                    parts.append(encoder(views.render(pixels, drawn.select(part))).float())
            return torch.cat(parts)

        return encode

    def histograms(self, split: Split, size_px: int) -> Histograms:
        """Return what gives the colour histograms of a split's images, as they are scored."""
        images = self.decoded(split, size_px)

        def count(rows: Tensor) -> Tensor:
            self._stop.check()
            parts = torch.split(rows.cpu(), ENCODE_IMAGES)
            return torch.cat([color_histograms(images.batch(part.numpy())) for part in parts])

        return count

    def find(self, split: Split, names: Collection[str]) -> Mapping[str, int]:
        """Return where in a split the images of these file names are.

        A name is a path in the data set, or its last part.

        Raises:
            ValueError: a name is not there, or several images have it.
        """
        wanted, found, twice = set(names), dict[str, int](), set[str]()
        for position, number in enumerate(self.numbers(split)):
            path = str(self._store.row(int(number))["path"])
            for name in wanted & {path, PurePosixPath(path).name}:
                if name in found:
                    twice.add(name)
                found[name] = position
        for fault, faulty in (("no", wanted - found.keys()), ("more than one", twice)):
            if faulty:
                example = min(faulty)
                raise ValueError(
                    f"{fault} {split} image is called {example!r}, as are {len(faulty) - 1} others"
                )
        return found

    def _used(self, split: Split) -> np.ndarray:
        labels = self._store.labels(split)
        if split == "train" and self._labelled_only:
            return labels >= 0
        return np.ones(len(labels), dtype=bool)


def _batch_size(encoder: Encoder) -> int:
    return max(1, min(ENCODE_IMAGES, ENCODE_PIXELS // encoder.image_size_px**2))
