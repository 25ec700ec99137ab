"""The networks of a recipe and of a run: freshly initialised, or with the weights of a finished stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdedge import store
from kdedge.data.batches import stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.models.network import Network, backbone, build
from kdedge.recipe import Recipe


def new_network(recipe: Recipe, name: str) -> Network:
    """The network `name` of a recipe, its weights drawn by the recipe's seed and its own name alone."""
    torch.manual_seed(stable_seed(recipe.seed, name, "weights"))
    return _built(recipe, recipe.networks[name].models, recipe.networks[name].dense)


def finished_network(run: store.Run, recipe: Recipe, name: str, stage: str) -> Network:
    """The network `name` as the finished stage left it, on the CPU and in eval mode.

    Its members are of the models that the stage recorded, which are not the recipe's once the worst were replaced. Raises
    RunError when the stage is not finished, or its weights are not those that were committed.
    """
    folder = run.stage(stage)
    file = folder / "weights.safetensors"
    record = store.read_document(folder / "stage.json")
    weights = store.load_tensors(file, record.get("weights_sha256", "(none)"))
    described = recipe.networks[name]
    try:
        network = _built(recipe, record.get("models", described.models), described.dense)
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"{file} does not fit network '{name}': {error}") from None
    return network.eval()


def with_new_members(network: Network, places: Sequence[int], recipe: Recipe, name: str) -> Network:
    """`network` with fresh members of the model that replaces its worst, in these places; those alone learn the dense vector."""
    improve = recipe.networks[name].improve
    assert improve is not None
    torch.manual_seed(stable_seed(recipe.seed, name, "improve", "weights"))
    network.members.requires_grad_(False)
    for place in sorted(places):
        fresh = backbone(improve.model).to(network.head.weight.device)
        network.members[place] = fresh.to(memory_format=torch.channels_last)
        network.models[place] = improve.model
    return network


def _built(recipe: Recipe, models: Sequence[str], dense: int) -> Network:
    network = build(models, dense, len(DATASETS[recipe.data.name].classes))
    return network.to(memory_format=torch.channels_last)
