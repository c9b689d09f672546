"""What processes compute together: `python -m tests.ctune.shared_training STORE FOLDER` is a rank.

`test_distributed.py` runs two ranks and compares what they leave behind with one process.
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ctune.augment import Shard
from ctune.backbones import build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.distributed import World
from ctune.events import Metrics
from ctune.features import RunImages
from ctune.head_sizes import SequenceMode, TransformerSettings
from ctune.losses.contrastive import nt_xent_loss, supervised_contrastive_loss_sharded
from ctune.methods.base import RunContext, Stage
from ctune.nnclr_head import NNCLRHead, NNCLRSettings
from ctune.schema import JsonObject
from ctune.seeding import seed_everything
from ctune.store import PackedStore
from ctune.train import Hooks, fit
from ctune.transformer_head import TransformerProjectionHead, images_in_scope
from tests.ctune.collectives import (
    check_a_stage,
    check_decisions,
    check_gathering,
    check_gradients_and_weights,
    check_the_end_of_another,
)
from tests.ctune.methods.test_contract import Bench
from tests.squares import tiny_config

CACHED = {"grad_cache": True, "micro_batch_size": 4}
TUNING = {
    "stages": ["contrastive_tuning"],
    "allow_random_head": True,
    "contrastive_tuning": {"epochs": 1},
}
COMBINED = {
    "epochs": 1,
    "batch_size": 12,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
CASES: dict[str, tuple[str, JsonObject]] = {
    "supcon": ("lacvit", {"contrastive": {"epochs": 1}}),
    "supcon, cached": ("lacvit", {"contrastive": {"epochs": 1, **CACHED}}),
    "nt_xent": ("lacvit", {"contrastive": {"epochs": 1, "loss": "nt_xent"}}),
    "nt_xent, cached": ("lacvit", {"contrastive": {"epochs": 1, "loss": "nt_xent", **CACHED}}),
    "n_pair": ("lacvit", {"contrastive": {"epochs": 1, "loss": "n_pair"}}),
    "n_pair, cached": ("lacvit", {"contrastive": {"epochs": 1, "loss": "n_pair", **CACHED}}),
    # SGD: biases before a batch norm have gradients of rounding errors alone, which Adam enlarges.
    "simclr": ("simclr", {"epochs": 1, "optimizer": "sgd"}),
    "simclr, cached": ("simclr", {"epochs": 1, "optimizer": "sgd", **CACHED}),
    "mae": ("mae", {"mae": {"epochs": 1, "batch_size": 9, "num_views": 2}}),
    "head_init": ("mae_ct", {"stages": ["head_init"], "head_init": {"epochs": 1}}),
    "contrastive_tuning": ("mae_ct", TUNING),
    "contrastive_tuning, cached": ("mae_ct", {**TUNING, **CACHED}),
    # At the published weight of 1e-3 the contrast would hardly show in the encoder's gradients.
    "combined": ("mae_ct", {"stages": ["combined"], "combined": COMBINED | {"nnclr_weight": 0.5}}),
    # Batches of 9, and the last of 3: shares of 4 and 5 rows, of 1 and 2.
    "finetune": ("finetune", {"tune": {"epochs": 1, "batch_size": 9}}),
    "probe": ("linear_probe", {"probe": {"epochs": 1, "batch_size": 9, "augment": "rrc_flip"}}),
    "probe of features": ("linear_probe", {"probe": {"epochs": 1, "batch_size": 9}}),
}
"""Name of a case to the method and what is laid over its tiny config."""
IMAGES, VIEWS, WIDTH = 12, 2, 5


class SharedBench(Bench):
    """A method whose batches the processes of a world share."""

    def __init__(self, case: str, store: Path, cache_dir: Path, world: World) -> None:
        name, method = CASES[case]
        self.world = world
        super().__init__(name, store, cache_dir, method)

    def context(self) -> RunContext:
        return replace(super().context(), world=self.world)

    def hooks(self, save: Any) -> Hooks:
        return replace(super().hooks(save), world=self.world)


def train(case: str, store: Path, folder: Path, world: World) -> JsonObject:
    """Return the gradients of one batch, and losses and weights of the first stage."""
    bench = SharedBench(case, store, folder / "cache", world)
    world.unite(bench.program.modules)
    plan = bench.program.plans[0]
    stage = plan.start()
    found = gradients(stage, world)
    fit(stage, name=plan.name, seed=1, start_step=0, hooks=bench.hooks(lambda step: None))
    told = [e.values["loss"] for e in bench.told if isinstance(e, Metrics) and "loss" in e.values]
    weights = {name: tensor.clone() for name, tensor in bench.program.modules.state_dict().items()}
    return {"losses": torch.tensor(told), "weights": weights, **found}


def gradients(stage: Stage, world: World) -> JsonObject:
    """Return loss and parameter gradients of the last batch of an epoch, the short one if any."""
    positions = stage.sampler.batches(0)[-1]
    rows = world.share(len(positions))
    shard = Shard(rows.start, len(positions))
    batch = replace(stage.source.fetch(positions[rows]), shard=shard)
    stage.method.train()
    output = stage.method.step(batch, torch.Generator().manual_seed(1))
    loss = output.loss * world.weight(len(batch.labels), batch.global_size)
    torch.autograd.backward(loss)
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    world.average_gradients(parameters)
    found = {str(n): p.grad.clone() for n, p in enumerate(parameters) if p.grad is not None}
    stage.optimizer.zero_grad()
    return {"loss": world.mean(loss.detach()), "gradients": found}


def sharded_supcon(world: World) -> JsonObject:
    """Return loss and gradient of anchors of this rank against everyone's, of a linear layer."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(IMAGES, VIEWS, WIDTH, generator=generator)
    layer = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
    labels = torch.arange(IMAGES) % 3
    rows = world.share(IMAGES)
    local = torch.nn.functional.normalize(inputs[rows] @ layer, dim=-1)
    everyone = world.gather(local)
    loss = supervised_contrastive_loss_sharded(
        local, labels[rows], everyone, world.gather(labels[rows]), rows.start
    )
    torch.autograd.backward(loss)
    world.average_gradients([layer])
    return {"loss": world.mean(loss.detach()), "gradients": {"layer": layer.grad}}


def nnclr_head(world: World) -> JsonObject:
    """Return loss and gradients of two steps of the head above a linear layer, and its state.

    Batch norm is over the global batch on CPUs too, for the head gets all pooled vectors.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, IMAGES, VIEWS, WIDTH, generator=generator)
    layer = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
    seed_everything(2)
    head = NNCLRHead(WIDTH, proj_hidden_dim=8, pred_hidden_dim=8, out_dim=4, queue_size=24)
    settings = NNCLRSettings(variant="nnclr_ema", top_k=3)
    rows = world.share(IMAGES)
    losses = []
    for step in range(2):
        ids = torch.arange(IMAGES) + 6 * step
        pooled = world.gather(inputs[step, rows] @ layer).unbind(1)
        found = head.training_loss(
            pooled,
            world.gather(ids[rows]),
            world.gather(ids[rows] % 3),
            settings=settings,
            generator=torch.Generator().manual_seed(step),
        )
        torch.autograd.backward(found.loss)
        losses.append(found.loss.detach())
    parameters = {"layer": layer} | dict(head.named_parameters())
    world.average_gradients(parameters.values())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    loss = world.mean(torch.stack(losses))
    return {"loss": loss, "gradients": gradients, "state": head.state_dict()}


def transformer_heads(world: World) -> JsonObject:
    """Return losses and gradients of both kinds of sequence above a linear layer.

    Every process runs the head on all rows, with batch norm inside it and at its end.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(IMAGES, VIEWS, WIDTH, generator=generator)
    layer = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
    settings = TransformerSettings(dim=8, depth=2, num_heads=2, ffn_dim=16, norm="batch")
    seed_everything(2)
    heads = torch.nn.ModuleDict(
        {
            mode: TransformerProjectionHead(WIDTH, 4, settings=settings, sequence_mode=mode)
            for mode in get_args(SequenceMode)
        }
    )
    losses = []
    for head in heads.values():
        vectors = world.gather(inputs[world.share(IMAGES)] @ layer)
        z = head(images_in_scope(vectors, "global", world).transpose(0, 1).flatten(0, 1))
        views = torch.stack(z.chunk(VIEWS), dim=1)
        loss = nt_xent_loss(views, temperature=0.2, normalize=True)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    parameters = {"layer": layer} | dict(heads.named_parameters())
    world.average_gradients(parameters.values())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {"loss": world.mean(torch.stack(losses)), "gradients": gradients}


def encode(store: Path, folder: Path, world: World) -> JsonObject:
    """Return the features of both splits: 48 and 18 images, encoded 10 at a time, so 5 and 2 turns.

    The decoded images lie in one file for all ranks.
    """
    config = RunConfig.model_validate(tiny_config())
    seed_everything(1)
    encoder = build_encoder(config.encoder, pool="mean", encoder_dir=None)
    images = RunImages(
        PackedStore(store),
        folder / "decoded",
        labelled_only=True,
        emit=lambda event: None,
        stop=StopRequest(),
        world=world,
    )
    device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctune.features.ENCODE_IMAGES", 10)
        return {split: images.encode(encoder, split, device) for split in ("train", "test")}


def compute(store: Path, folder: Path, world: World) -> dict[str, JsonObject]:
    """Return what this rank found in every case."""
    found = {case: train(case, store, folder / f"{world.rank}", world) for case in CASES}
    return found | {
        "sharded supcon": sharded_supcon(world),
        "nnclr head": nnclr_head(world),
        "transformer heads": transformer_heads(world),
        "encode": encode(store, folder, world),
    }


def start_ranks(module: str, *arguments: str, size: int = 2) -> list[subprocess.Popen[str]]:
    """Start the ranks of a module, as torchrun would, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


if __name__ == "__main__":
    with World.from_environment(gpu=False) as joined:
        check_gathering(joined)
        check_gradients_and_weights(joined)
        check_decisions(joined)
        check_a_stage(joined)
        results = compute(Path(sys.argv[1]), Path(sys.argv[2]), joined)
        torch.save(results, Path(sys.argv[2]) / f"{joined.rank}.pt")
        check_the_end_of_another(joined)
