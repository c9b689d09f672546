import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ctune import export as export_module
from ctune.backbones import Encoder, Pool, build_encoder
from ctune.embed import load_model
from ctune.encoders import FileEncoder, ModelEncoder, TimmEncoder
from ctune.errors import EncoderError
from ctune.export import ExportError, export_model
from ctune.heads import ProjectionHead
from ctune.masked_autoencoder import Decoder
from ctune.model_dir import hash_file, read_info
from ctune.nnclr_head import NNCLRHead
from ctune.schema import JsonObject
from ctune.weights import read_head

TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
PROVENANCE: JsonObject = {
    "config": {
        "seed": 5,
        "encoder": {"source": "timm", "name": "vit_tiny_patch16_224"},
        "method": {"name": "lacvit", "contrastive": {"temperature": 0.1}},
    },
    "data_sha256": "ab" * 32,
    "job_id": "job_1",
    "versions": {"ctune": "0.1.0", "timm": timm.__version__},
}
EVALUATION: JsonObject = {
    "before": {"knn": {"top1": 0.25}, "isotropy": {"histogram": [1, 2]}},
    "after": {"knn": {"top1": 0.75}, "classifier": {"top1": 0.5}},
}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(31, 50, 3), (700, 333, 3), (8, 8, 3)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def encoder(
    name: str = "vit_tiny_patch16_224", size_px: int = 16, pool: Pool = "mean", **options: Any
) -> Encoder:
    torch.manual_seed(0)
    config = TimmEncoder(name=name, pretrained=False, image_size_px=size_px, options=options)
    return build_encoder(config, pool=pool, encoder_dir=None, drop_path=0.0)


def export(made: Encoder, path: Path, **given: Any) -> JsonObject:
    fields = {
        "provenance": PROVENANCE,
        "evaluation": EVALUATION,
        "reference_images": images(),
        **given,
    }
    return export_model(made, path, **fields)


@pytest.mark.parametrize(
    ("name", "size_px", "pool", "options"),
    [
        ("vit_tiny_patch16_224", 16, "mean", TINY),
        ("vit_tiny_patch16_224", 16, "cls", TINY),
        ("vit_tiny_patch16_224", 16, "auto", {**TINY, "dynamic_img_size": True}),
        ("vit_base_patch16_siglip_224", 32, "auto", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("beit_base_patch16_224", 32, "mean", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("eva02_tiny_patch14_224", 28, "cls", {"depth": 1}),
        ("swin_tiny_patch4_window7_224", 224, "auto", {"depths": [1, 1, 1, 1], "embed_dim": 12}),
        ("resnet18", 32, "auto", {}),
        ("convnext_atto", 40, "auto", {}),
        ("mobilenetv3_small_050", 32, "auto", {}),
    ],
)
def test_plain_timm_gives_the_vectors_of_the_encoder_in_memory(
    tmp_path: Path, name: str, size_px: int, pool: Pool, options: dict[str, Any]
) -> None:
    made = encoder(name, size_px, pool, **options).eval()
    made.mean = (0.1, 0.2, 0.3)
    export(made, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    config = timm.data.config.resolve_model_data_config(plain)  # type: ignore[no-untyped-call]
    transform = timm.data.transforms_factory.create_transform(**config)
    pictures = images()
    pixels = torch.stack([made.preprocessing.to_uint8(picture) for picture in pictures])
    with torch.inference_mode():
        wanted = made(made.preprocessing.normalise(pixels))
        found = plain(torch.stack([transform(picture) for picture in pictures]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert plain.num_classes == 0


def test_directory_is_as_documented(tmp_path: Path) -> None:
    made = encoder(**TINY)
    classifier = nn.Linear(24, 3)
    head = ProjectionHead(24, out_dim=8)
    written = export(
        made,
        tmp_path / "model",
        classes=["a", "b", "c"],
        heads={"classifier": classifier, "projection_head": head},
    )
    folder = tmp_path / "model"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "model.safetensors", "model.json", "README.md"),
        *("classifier.safetensors", "projection_head.safetensors"),
        *(f"reference/00{n}.png" for n in range(3)),
        "reference/vectors.safetensors",
    }
    assert written == json.loads((folder / "model.json").read_text(encoding="utf-8"))
    info = read_info(folder)
    assert info.files.keys() == names - {"model.json"}
    assert (info.seed, info.licence, info.classes) == (5, None, ["a", "b", "c"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "linear layer on these vectors, for 3 classes" in card
    assert info.head is not None and info.head.num_classes == 3
    assert info.method == PROVENANCE["config"]["method"]
    assert info.provenance == PROVENANCE and info.evaluation == EVALUATION
    stored = load_file(folder / "classifier.safetensors")
    assert torch.equal(stored["weight"], classifier.weight)
    stored_head = load_file(folder / "projection_head.safetensors")
    head.load_state_dict(stored_head)
    vectors = load_file(folder / "reference/vectors.safetensors")
    assert vectors["vectors"].shape == (3, 24) and vectors["probabilities"].shape == (3, 3)
    with Image.open(folder / "reference/001.png") as kept:
        assert max(kept.size) == 512


def test_encoder_stays_as_it_is(tmp_path: Path) -> None:
    made = encoder(**TINY).train()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    export(made, tmp_path / "model")
    assert made.training
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_same_export_same_bytes(tmp_path: Path) -> None:
    first = export(encoder(**TINY), tmp_path / "a")
    second = export(encoder(**TINY), tmp_path / "b")
    assert first == second


def test_exported_model_is_the_encoder_of_the_next_run(tmp_path: Path) -> None:
    made = encoder(**TINY).eval()
    export(made, tmp_path / "model")
    pixels = torch.randn(2, 3, 16, 16)
    for config in (FileEncoder(path=str(tmp_path / "model")), ModelEncoder(id="mdl_x")):
        again = build_encoder(config, pool="auto", encoder_dir=tmp_path / "model").eval()
        assert again.model_args == made.model_args
        assert again.preprocessing == made.preprocessing
        assert torch.equal(again(pixels), made(pixels))
    larger = build_encoder(
        ModelEncoder(id="mdl_x", image_size_px=32), pool="cls", encoder_dir=tmp_path / "model"
    )
    assert larger(torch.zeros(1, 3, 32, 32)).shape == (1, 24)
    assert larger.model_args["global_pool"] == "token"


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "features_only"])
def test_a_directory_cannot_make_timm_load_other_files(tmp_path: Path, option: str) -> None:
    export(encoder(**TINY), tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_args"][option] = "/tmp/x.pth"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(EncoderError, match=option) as caught:
        build_encoder(ModelEncoder(id="mdl_x"), pool="auto", encoder_dir=tmp_path / "model")
    assert caught.value.error_code == "unknown_option"


def test_licence_travels(tmp_path: Path) -> None:
    made = encoder(**TINY)
    made.licence = "cc-by-nc-4.0"
    export(made, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    tuned = ModelEncoder(id="mdl_x")
    with pytest.raises(EncoderError, match="cc-by-nc"):
        build_encoder(tuned, pool="auto", encoder_dir=tmp_path / "model")
    again = build_encoder(
        tuned, pool="auto", encoder_dir=tmp_path / "model", allow_noncommercial_weights=True
    )
    assert load_model(tmp_path / "model").info.licence == "cc-by-nc-4.0"  # serving goes on
    assert again.licence == "cc-by-nc-4.0"
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert 'license: "cc-by-nc-4.0"' in card


def test_card_tells_what_matters_and_its_snippet_runs(tmp_path: Path) -> None:
    export(encoder(**TINY), tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    for said in (
        "| knn.top1 | 0.25 | 0.75 |",
        "| classifier.top1 |  | 0.5 |",
        "16 x 16 pixels",
        "ab" * 32,
        "job_1",
        "no licence of earlier weights",
        '"temperature": 0.1',
    ):
        assert said in card, said
    assert "histogram" not in card
    snippet = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(tmp_path / "model")
    try:
        exec(snippet, names)
    finally:
        os.chdir(before)
    wanted = load_file(tmp_path / "model/reference/vectors.safetensors")["vectors"]
    torch.testing.assert_close(names["vector"][0], wanted[0], rtol=0, atol=1e-5)


def test_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    export(encoder(**TINY), tmp_path / "model")
    assert not (tmp_path / "model/old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_proof_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = export_module.timm_config

    def wrong(made: Encoder) -> JsonObject:
        written = config(made)
        written["pretrained_cfg"]["mean"] = [0.0, 0.0, 0.0]
        return written

    monkeypatch.setattr(export_module, "timm_config", wrong)
    with pytest.raises(ExportError, match=r"when ctune loads it: a difference of"):
        export(encoder(**TINY), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    made = encoder(**TINY)
    with torch.no_grad():
        next(made.parameters()).fill_(float("nan"))
    with pytest.raises((ExportError, EncoderError)):
        export(made, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reference_images": []}, "at least one image"),
        ({"heads": {"classifier": nn.Linear(24, 3)}}, "classes must name each"),
        ({"heads": {"classifier": nn.Linear(24, 3)}, "classes": ["a"]}, "3 outputs"),
        ({"heads": {"classifier": nn.Linear(23, 1)}, "classes": ["a"]}, "takes 23 dimensions"),
        ({"heads": {"classifier": nn.Linear(24, 1, bias=False)}, "classes": ["a"]}, "with a bias"),
        ({"heads": {"classifier": nn.Identity()}, "classes": ["a"]}, r"nn\.Linear"),
        ({"heads": {"head": nn.Linear(24, 1)}}, r"\['head'\] are unknown"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export(encoder(**TINY), tmp_path / "model", **given)
    assert list(tmp_path.iterdir()) == []


def test_head_without_weights_has_no_file(tmp_path: Path) -> None:
    export(encoder(**TINY), tmp_path / "model", heads={"projection_head": nn.Identity()})
    assert not (tmp_path / "model/projection_head.safetensors").exists()


@pytest.mark.parametrize("name", ["nnclr_head", "mae_decoder"])
def test_a_head_is_read_as_it_was(tmp_path: Path, name: str) -> None:
    head = further_heads()[name]
    wanted = {key: value.clone() for key, value in head.state_dict().items()}
    export(encoder(**TINY), tmp_path / "model", heads=further_heads())
    found = read_head(tmp_path / "model", name)
    assert found is not None and found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    head.load_state_dict(found)
    assert read_head(tmp_path / "model", "projection_head") is None


def further_heads() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    nnclr = NNCLRHead(24, proj_hidden_dim=8, pred_hidden_dim=8, out_dim=4, queue_size=6)
    nnclr.queue.enqueue(torch.eye(4)[:3], torch.tensor([2, -1, 0]), torch.tensor([7, 40, 3]))
    decoder = Decoder(24, 48, grid_size=(4, 4), embed_dim=16, depth=1, num_heads=2, mlp_ratio=4.0)
    return {"nnclr_head": nnclr, "mae_decoder": decoder}


def test_a_model_with_further_heads_is_used_and_described_as_any(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    written = export(encoder(**TINY), folder, heads=further_heads())
    files = ("nnclr_head.safetensors", "mae_decoder.safetensors")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert written["head"] is None
    for file in files:
        assert written["files"][file] == hash_file(folder / file)
        assert f"`{file}` is " in card
    assert "classifier.safetensors" not in card
    model = load_model(folder)
    assert model.verify().min_cosine > 0.9999
    small = encoder(**TINY)
    assert model.size_bytes == sum(4 * weight.numel() for weight in small.parameters())
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert plain.state_dict().keys() == small.backbone.state_dict().keys()


def test_a_damaged_head_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(encoder(**TINY), folder, heads=further_heads())
    path = folder / "nnclr_head.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EncoderError, match=r"nnclr_head\.safetensors has sha256") as caught:
        read_head(folder, "nnclr_head")
    assert caught.value.error_code == "model_damaged"
    assert read_head(folder, "mae_decoder") is not None
    path.unlink()
    with pytest.raises(EncoderError, match=r"nnclr_head\.safetensors is missing"):
        read_head(folder, "nnclr_head")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu(tmp_path: Path) -> None:
    made = encoder(**TINY).cuda()
    export(made, tmp_path / "model", classes=["a"], heads={"classifier": nn.Linear(24, 1).cuda()})
    assert next(made.parameters()).is_cuda
    found = load_model(tmp_path / "model", device="cuda").verify()
    assert found.min_cosine > 0.9999
