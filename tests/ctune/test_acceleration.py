"""Compiling, checkpointing and memory format change nothing but speed, memory and rounding."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import ctune
from ctune.acceleration import CPP_COMPILERS, accelerate, is_convolutional
from ctune.backbones import Encoder, build_encoder
from ctune.encoders import TimmEncoder
from ctune.errors import ConfigError
from ctune.export import export_model
from ctune.grad_cache import embed_in_micro_batches
from tests.squares import tiny_config

CPU = torch.device("cpu")
VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
HAS_COMPILER = any(map(shutil.which, CPP_COMPILERS))


def encoder(name: str = "vit_tiny_patch16_224", drop_path: float = 0.0, **options: Any) -> Encoder:
    torch.manual_seed(0)
    config = TimmEncoder(name=name, pretrained=False, image_size_px=32, options=options)
    return build_encoder(config, pool="auto", encoder_dir=None, drop_path=drop_path)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, vectors: Tensor) -> Tensor:
    module.zero_grad()
    torch.autograd.backward(vectors.square().sum())
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def saved_bytes(module: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(images())
    return sum(kept)


def test_checkpointed_gradients_are_the_same_for_less_memory() -> None:
    plain = encoder(drop_path=0.3, **VIT)
    checkpointed = encoder(drop_path=0.3, **VIT)
    assert accelerate(checkpointed, CPU, compile=False, gradient_checkpointing=True) == []
    assert saved_bytes(checkpointed) < 0.6 * saved_bytes(plain)
    found = []
    for module in (plain, checkpointed):
        torch.manual_seed(5)
        found.append(gradients(module, module(images())))
    assert_same(found[1], found[0])


def test_checkpointing_inside_gradient_caching() -> None:
    module = encoder(**VIT)
    expected = gradients(module, module(images()))
    accelerate(module, CPU, compile=False, gradient_checkpointing=True)
    vectors = embed_in_micro_batches(
        lambda part, rows: module(part), images(), module=module, micro_batch_size=4
    )
    assert_same(gradients(module, vectors), expected)


def test_batch_norms_that_are_counted_twice_are_told_of() -> None:
    module = encoder("resnet18")
    (warning,) = accelerate(module, CPU, compile=False, gradient_checkpointing=True)
    assert warning.code == "batch_norm_counted_twice"


def test_an_architecture_without_checkpointing_is_refused() -> None:
    module = encoder("legacy_seresnet18")
    with pytest.raises(ConfigError, match="legacy_seresnet18 does not support gradient check"):
        accelerate(module, CPU, compile=False, gradient_checkpointing=True)
    module.backbone = nn.Identity()
    with pytest.raises(ConfigError, match="it has no set_grad_checkpointing"):
        accelerate(module, CPU, compile=False, gradient_checkpointing=True)


def test_a_machine_without_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="needs a C"):
        accelerate(encoder(**VIT), CPU, compile=True, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", True),
        ("convnext_atto", True),
        ("efficientnet_b0", True),
        ("vit_tiny_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
    ],
)
def test_convolutional_encoders_are_known(name: str, expected: bool) -> None:
    module = encoder(**VIT)
    with torch.device("meta"):
        module.backbone = timm.create_model(name)
    assert is_convolutional(module) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_convolutions_are_channels_last_on_a_gpu(tmp_path: Path) -> None:
    module = encoder("resnet18").cuda().eval()
    before = module(images().cuda())
    accelerate(module, torch.device("cuda"), compile=False, gradient_checkpointing=False)
    weight = module.get_parameter("backbone.layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(images().cuda()), before, rtol=1e-3, atol=1e-3)
    export(module, tmp_path)


def export(module: Encoder, folder: Path) -> None:
    picture = Image.new("RGB", (32, 32), (10, 200, 30))
    export_model(
        module,
        folder / "model",
        provenance={"config": {"seed": 0}},
        evaluation={},
        reference_images=[picture],
    )


def test_a_run_takes_its_resources_at_their_word(archive: Path, tmp_path: Path) -> None:
    encoder = {"source": "timm", "name": "resnet18", "pretrained": False, "image_size_px": 32}
    resources = {"gpus": 0, "gradient_checkpointing": True}
    config = tiny_config("linear_probe", encoder=encoder, resources=resources)
    result = ctune.run(config, archive, tmp_path)
    assert "batch_norm_counted_twice" in [warning["code"] for warning in result["warnings"]]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_encoder_is_the_same_encoder(tmp_path: Path) -> None:
    module = encoder(**VIT)
    names = list(module.state_dict())
    expected = gradients(module, module(images()))
    with torch.no_grad():
        vectors = module.eval()(images())
    accelerate(module.train(), CPU, compile=True, gradient_checkpointing=False)
    assert_same(gradients(module, module(images())), expected)
    cached = embed_in_micro_batches(
        lambda part, rows: module(part), images(), module=module, micro_batch_size=4
    )
    assert_same(gradients(module, cached), expected)
    with torch.no_grad():
        for count in (6, 5, 3):
            assert_same(module.eval()(images()[:count]), vectors[:count])
    assert list(module.state_dict()) == names
    export(module, tmp_path)
