"""Models in memory: loaded on first use, checked against their reference vectors, least recently
used ones dropped. The only file of the service that imports `ctune.embed` and so torch.

Every method blocks; call them from threads.
"""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctune import model_dir as names
from ctune.embed import LoadedModel, load_model
from ctune.errors import EncoderError
from ctune.images import decode_rgb
from service.storage import Storage

MODEL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
Vectors = NDArray[np.float32]
_log = logging.getLogger("ctune.embed")


class UnknownModelError(Exception):
    """There is no model with this id."""


class ModelUnusableError(Exception):
    """The model is there but cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class _Cached:
    model: LoadedModel
    stamp: tuple[int, int]
    """Inode and change time of `model.json`: tells a replaced model."""


class Engine:
    """The models below one data directory.

    Args:
        cache_bytes: memory that loaded models may take; a larger one is loaded alone.
        max_pixels: largest image area.
        device: torch device; none for the GPU where there is one.
    """

    def __init__(
        self, storage: Storage, *, cache_bytes: int, max_pixels: int, device: str | None = None
    ) -> None:
        self._storage = storage
        self._cache_bytes = cache_bytes
        self._max_pixels = max_pixels
        self._device = device
        self._models: OrderedDict[str, _Cached] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        """Ids of the models in memory, least recently used first."""
        with self._lock:
            return list(self._models)

    def model(self, model_id: str) -> LoadedModel:
        """Return a model, loading it if it is not in memory.

        Raises:
            UnknownModelError: there is none, or it was deleted.
            ModelUnusableError: a file is damaged, or it does not give its reference vectors.
        """
        folder, stamp = self._find(model_id)
        found = self._take(model_id, stamp)
        if found is not None:
            return found
        with self._loading:
            found = self._take(model_id, stamp)
            if found is None:
                found = self._load(model_id, folder)
                with self._lock:
                    self._models[model_id] = _Cached(found, stamp)
            return found

    def prepare(self, model: LoadedModel, data: bytes) -> Any:
        """Decode and resize the bytes of an image file to what `vectors` takes.

        Raises:
            DataError: they are not an image that can be used.
        """
        return model.prepare(decode_rgb(data, max_pixels=self._max_pixels))

    def vectors(self, model: LoadedModel, items: Sequence[Any]) -> list[Vectors]:
        """Return the vector [D] of every prepared image, not normalised.

        Raises:
            EncoderError: the model gives NaN or infinity.
        """
        return list(model.embed(items).numpy())

    def probabilities(self, model: LoadedModel, vectors: Vectors) -> Vectors:
        """Return the probabilities [n, C] that belong to vectors [n, D], not normalised.

        Raises:
            EncoderError: the model has no classifier.
        """
        found: Vectors = model.probabilities(vectors).numpy()
        return found

    def _find(self, model_id: str) -> tuple[Path, tuple[int, int]]:
        if MODEL_ID.fullmatch(model_id):
            folder = self._storage.model(model_id)
            try:
                status = (folder / names.INFO).stat()
            except FileNotFoundError:
                pass
            else:
                return folder, (status.st_ino, status.st_mtime_ns)
        with self._lock:
            self._models.pop(model_id, None)
        raise UnknownModelError(model_id)

    def _take(self, model_id: str, stamp: tuple[int, int]) -> LoadedModel | None:
        with self._lock:
            cached = self._models.get(model_id)
            if cached is None or cached.stamp != stamp:
                self._models.pop(model_id, None)
                return None
            self._models.move_to_end(model_id)
            return cached.model

    def _make_room(self, needed_bytes: int) -> None:
        with self._lock:
            used = sum(cached.model.size_bytes for cached in self._models.values())
            while self._models and used + needed_bytes > self._cache_bytes:
                dropped, cached = self._models.popitem(last=False)
                used -= cached.model.size_bytes
                _log.info("model %s leaves the memory", dropped)

    def _load(self, model_id: str, folder: Path) -> LoadedModel:
        try:
            self._make_room((folder / names.WEIGHTS).stat().st_size)
            model = load_model(folder, device=self._device)
            found = model.verify()
        except (EncoderError, OSError) as error:
            self._find(model_id)  # deleted while it was read: that is no damage
            said = f"{error}. {error.hint}" if isinstance(error, EncoderError) else str(error)
            _log.warning("model %s cannot be loaded: %s", model_id, said)
            raise ModelUnusableError(said.replace(str(folder), model_id)) from error
        self._find(model_id)
        _log.info("model %s loaded: cosine to its reference %.6f", model_id, found.min_cosine)
        return model
