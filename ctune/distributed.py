"""The processes ("ranks") that train one run together, and what they say to each other.

Every rank holds the whole model and takes its contiguous rows of each global batch. There is no
DistributedDataParallel: a loss that couples the rows is computed as a whole on every rank from the
gathered embeddings, and the gradients of the parameters are averaged after backward
(`lacvit.md`, section 8). Tensors travel over NCCL between GPUs and over gloo between CPUs; flags
and objects always over gloo, so that they wait for no GPU.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ctune.child import StopRequest
from ctune.errors import RankLostError

BUCKET_BYTES = 64 * 2**20
"""Gradients that are sent together."""
T = TypeVar("T")
P = ParamSpec("P")

WAIT = timedelta(days=7)
"""How long a rank waits for another: rank 0 evaluates and decodes alone. A rank that *ends* is
noticed at once, by its closed connections and by torchrun."""


def _among_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Let a collective that breaks off raise `RankLostError`."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no type of its own for gloo's errors
            raise RankLostError(
                f"the processes of this run lost each other: {error}",
                hint="the log says which one ended first, and why",
            ) from error

    return checked


@dataclass(frozen=True)
class World:
    """The ranks of one run; `World()` is a single process, for which nothing is ever sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which GPU of this machine is this rank's."""
    _control: dist.ProcessGroup | None = field(default=None, repr=False)
    """Group for flags and objects; None: the default one, which is gloo's."""

    @classmethod
    @contextmanager
    def from_environment(cls, *, gpu: bool) -> Iterator["World"]:
        """Join the ranks that torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK describe.

        Without them this is a single process. On leaving in good order all wait for each other.

        Args:
            gpu: tensors are on GPUs (NCCL), else on CPUs (gloo).

        Raises:
            RankLostError: the others cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls()
            return
        world = cls._join(size, gpu=gpu)
        yield world
        world.any(False)  # leave together: to end NCCL is a collective of its own
        dist.destroy_process_group()

    @classmethod
    @_among_ranks
    def _join(cls, size: int, *, gpu: bool) -> "World":
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=WAIT)
        if not gpu:
            return cls(rank, size, local_rank)
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WAIT))
        return cls(rank, size, local_rank, control)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes events, checkpoints and models, and evaluates."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this rank's contiguous rows of `count`; shares differ by one row at most.

        Fewer rows than ranks are not divided: every rank then takes them all.
        """
        if count < self.size:
            return slice(0, count)
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def weight(self, rows: int, count: int) -> float:
        """Return what makes the ranks' mean of means over `rows` of `count` a mean over all rows.

        1 for equal shares, and where every rank has all rows.
        """
        return 1.0 if rows == count else rows * self.size / count

    def gather(self, tensor: Tensor) -> Tensor:
        """Return [size * n, ...]: the ranks' tensors [n, ...] in rank order, with gradient.

        Backward sums the ranks' gradients and returns the local rows. A loss that every rank
        computes as a whole on the result thereby gives, in the mean of the ranks' parameter
        gradients, the gradient of the one global batch: scale by nothing. Integers may be gathered
        too, without gradient.
        """
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the ranks' rows [n, ...] in rank order; n may differ. Without gradient."""
        if self.size == 1:
            return rows
        counts = self.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = torch.cat(
            [rows.detach(), rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])]
        )
        parts = self.gather(padded).view(self.size, max(counts), *rows.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks; all ranks have the same ones."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = _all_reduce(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            parts = torch.split_with_sizes(flat.div_(self.size), [g.numel() for g in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks of a tensor, without gradient."""
        return values if self.size == 1 else _all_reduce(values.detach().clone()) / self.size

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank: all ranks decide alike."""
        return self.any_each(flag)[0]

    @_among_ranks
    def any_each(self, *flags: bool) -> list[bool]:
        """Return `any` of each flag, in one message."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control)
        return [bool(vote) for vote in votes]

    def check(self, stop: StopRequest) -> None:
        """Do nothing unless any rank was asked to stop; all ranks must call it.

        Raises:
            StopRequested: on every rank, at the same call.
        """
        if self.any(stop.requested):
            stop.request("another process of the run was asked to stop")
            stop.check()

    @_among_ranks
    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; it must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._control)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Return what `work` gives on rank 0; the others wait for it. It must be picklable."""
        return self.broadcast(work() if self.is_main else cast(T, None))

    @_among_ranks
    def unite(self, module: nn.Module) -> None:
        """Prepare for training together: rank 0's weights everywhere, batch norm over all rows.

        On CPUs batch norm stays by rank: torch has no other there.
        """
        if self.size > 1:
            if next(module.parameters()).device.type == "cuda":
                convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
            for tensor in [*module.parameters(), *module.buffers()]:
                data = tensor.detach().contiguous()
                dist.broadcast(data, 0)
                tensor.detach().copy_(data)


class _Gather(torch.autograd.Function):
    """All-gather whose backward is all-reduce and slice, on every backend alike."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(tensor)  # type: ignore[attr-defined]
        return _all_gather(tensor, world)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        world, rows = ctx.world, ctx.rows  # type: ignore[attr-defined]
        total = _all_reduce(gradient.clone(memory_format=torch.contiguous_format))
        return total[world.rank * rows : (world.rank + 1) * rows], None


@_among_ranks
def _all_gather(tensor: Tensor, world: World) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


@_among_ranks
def _all_reduce(tensor: Tensor) -> Tensor:
    """Sum a contiguous tensor over the ranks in place, and return it."""
    dist.all_reduce(tensor)
    return tensor


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one type, in order, to messages that are large and still fit anywhere."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size_bytes = sum(t.nbytes for t in [*bucket, tensor])
        if bucket and (tensor.dtype != bucket[0].dtype or size_bytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
