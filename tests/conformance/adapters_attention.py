"""Adapters of the diagnostics of attention over a batch."""

from ctune.attention_maps import (
    class_attention_statistics,
    positive_attention_mass,
    sharpness,
    sort_attention_by_class,
)
from ctune.evaluate.cluster_integrity import IntegritySearch, cluster_integrity
from ctune.evaluate.deep_fusion import (
    block_diagonal_attention,
    noise_projection_bounds,
    sharpness_gain_rate,
)
from tests.conformance.convert import Adapter, Case, integers, options, tensors


def _sort_attention_by_class(inputs: Case, parameters: Case) -> Case:
    (attention,) = tensors(inputs, parameters, "attention")
    found = sort_attention_by_class(attention, integers(inputs["labels"]))
    return {"order": found["order"].tolist(), "attention": found["attention"].tolist()}


def _sharpness(inputs: Case, parameters: Case) -> Case:
    (attention,) = tensors(inputs, parameters, "attention")
    return {"value": sharpness(attention, integers(inputs["labels"]), **options(parameters))}


def _class_attention_statistics(inputs: Case, parameters: Case) -> Case:
    (attention,) = tensors(inputs, parameters, "attention")
    return dict(class_attention_statistics(attention, integers(inputs["labels"])))


def _positive_attention_mass(inputs: Case, parameters: Case) -> Case:
    (attention,) = tensors(inputs, parameters, "attention")
    found = positive_attention_mass(attention, **options(parameters))
    return {"per_head": found["per_head"].tolist(), "chance": found["chance"]}


def _cluster_integrity(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    given = inputs.get("initial_directions")
    found = cluster_integrity(
        features,
        integers(inputs["labels"]),
        rank=parameters.get("rank"),
        search=IntegritySearch(**options(parameters, "rank")),
        initial_directions=None
        if given is None
        else tensors(inputs, parameters, "initial_directions")[0],
    )
    return dict(found)


def _block_diagonal_attention(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    found = block_diagonal_attention(features, integers(inputs["labels"]))
    return {
        "weight": found["weight"].tolist(),
        "projected": found["projected"].tolist(),
        "attention": found["attention"].tolist(),
        "rho": found["rho"],
        "lower_bound": found["lower_bound"].tolist(),
    }


def _noise_projection_bounds(inputs: Case, parameters: Case) -> Case:
    return dict(noise_projection_bounds(**options(parameters)))


def _sharpness_gain_rate(inputs: Case, parameters: Case) -> Case:
    return dict(sharpness_gain_rate(**options(parameters)))


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("transformer_head", "sort_attention_by_class"): _sort_attention_by_class,
    ("transformer_head", "sharpness"): _sharpness,
    ("transformer_head", "class_attention_statistics"): _class_attention_statistics,
    ("transformer_head", "positive_attention_mass"): _positive_attention_mass,
    ("transformer_head", "cluster_integrity"): _cluster_integrity,
    ("transformer_head", "block_diagonal_attention"): _block_diagonal_attention,
    ("transformer_head", "noise_projection_bounds"): _noise_projection_bounds,
    ("transformer_head", "sharpness_gain_rate"): _sharpness_gain_rate,
}
