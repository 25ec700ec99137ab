"""The networks of a recipe and of a run: freshly initialised, or with the weights of a finished stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kdedge import store
from kdedge.data.batches import stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.models import catalog
from kdedge.models.network import Network, backbone, build, build_ensemble
from kdedge.models.view import Centre, LowResolution
from kdedge.quantize.layers import quantized_backbone, quantized_network
from kdedge.recipe import Recipe
from kdedge.recipe_images import View


def new_network(recipe: Recipe, name: str) -> Network:
    """The network `name` of a recipe, its weights drawn by the recipe's seed and its own name alone, and nothing rounded."""
    torch.manual_seed(stable_seed(recipe.seed, name, "weights"))
    return _built(recipe, name, recipe.models(name))


def new_parts(recipe: Recipe, name: str, number: int, source: str) -> nn.ParameterDict:
    """What lesson `number` of the network `name` learns itself while it teaches from `source`, freshly drawn: by the
    recipe's seed, the network's name, the lesson's number and its source alone. Most lessons learn nothing."""
    described = recipe.networks[name]
    lesson = described.learns[number]
    generator = torch.Generator().manual_seed(stable_seed(recipe.seed, name, "parts", number, source))
    parts = nn.ParameterDict()
    if not lesson.has_parts:
        return parts
    student, target = _shape(recipe, name, lesson.output), _shape(recipe, source, lesson.target)
    for part_name, part in lesson.parts(len(described.models), student, target).items():
        bound = 1 / math.sqrt(part.inputs) if part.inputs else 0.0
        parts[part_name] = torch.empty(part.shape).uniform_(-bound, bound, generator=generator)
    return parts


def _shape(recipe: Recipe, name: str, output: str) -> tuple[int, ...]:
    """Of a network's dense vector, (width,), or of the maps of a layer, (channels, height, width)."""
    return (recipe.dense(name),) if output == "dense" else catalog.layers(recipe.models(name)[0])[output]


def finished_network(run: store.Run, recipe: Recipe, name: str, stage: str) -> Network:
    """The network `name` as the finished stage left it, on the CPU and in eval mode.

    Its members are of the models that the stage recorded, which are not the recipe's once the worst were replaced. Raises
    RunError when the stage is not finished, or its weights are not those that were committed.
    """
    folder = run.stage(stage)
    file = folder / "weights.safetensors"
    record = store.read_document(folder / "stage.json")
    weights = store.load_tensors(file, record.get("weights_sha256", "(none)"))
    try:
        network = _built(recipe, name, record.get("models", recipe.models(name)))
        if (quantize := recipe.networks[name].quantize) is not None:
            network = quantized_network(network, quantize.weights, quantize.observe_steps)
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"{file} does not fit network '{name}': {error}") from None
    return network.eval()


def with_new_members(network: Network, places: Sequence[int], recipe: Recipe, name: str) -> Network:
    """`network` with fresh members of the model that replaces its worst, in these places; those alone learn the dense vector."""
    described = recipe.networks[name]
    improve, quantize = described.improve, described.quantize
    assert improve is not None
    torch.manual_seed(stable_seed(recipe.seed, name, "improve", "weights"))
    network.members.requires_grad_(False)
    for place in sorted(places):
        fresh = _behind(described.view, backbone(improve.model))
        if quantize is not None:
            fresh = quantized_backbone(fresh, quantize.weights, quantize.observe_steps)
        fresh = fresh.to(network.heads()[0].weight.device)
        network.members[place] = fresh.to(memory_format=torch.channels_last)
        network.models[place] = improve.model
    return network


def _built(recipe: Recipe, name: str, models: Sequence[str]) -> Network:
    """The network `name`, its members of these models."""
    described, classes = recipe.networks[name], len(DATASETS[recipe.data.name].classes)
    if described.split == "none":
        network = build_ensemble(models, described.widths, classes)
    else:
        network = build(models, recipe.dense(name), classes)
    network.members = nn.ModuleList(map(_behind, recipe.views(name), network.members))
    return network.to(memory_format=torch.channels_last)


def _behind(view: View | None, member: nn.Module) -> nn.Module:
    """A member that sees of each image what `view` leaves; the member itself where that is all of it.

    So each member takes whole images, alone, beside members that see them otherwise, and in its file.
    """
    parts: list[nn.Module] = []
    if view is not None and view.resize is not None:
        parts.append(LowResolution(view.resize))
    if view is not None and view.centre is not None:
        parts.append(Centre(view.centre))
    return nn.Sequential(*parts, member) if parts else member
