"""The networks of a recipe and of a run: freshly initialised, or with the weights of a finished stage."""

from __future__ import annotations

import torch

from kdedge import store
from kdedge.data.batches import stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.models.network import Network, build
from kdedge.recipe import Recipe


def new_network(recipe: Recipe, name: str) -> Network:
    """The network `name` of a recipe, its weights drawn by the recipe's seed and its own name alone."""
    torch.manual_seed(stable_seed(recipe.seed, name, "weights"))
    described = recipe.networks[name]
    network = build(described.models, described.dense, len(DATASETS[recipe.data.name].classes))
    return network.to(memory_format=torch.channels_last)


def finished_network(run: store.Run, recipe: Recipe, name: str, stage: str) -> Network:
    """The network `name` as the finished stage left it, on the CPU and in eval mode.

    Raises RunError when the stage is not finished, or its weights are not those that were committed.
    """
    folder = run.stage(stage)
    file = folder / "weights.safetensors"
    weights = store.load_tensors(file, store.read_document(folder / "stage.json").get("weights_sha256", "(none)"))
    network = new_network(recipe, name)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{file} does not fit network '{name}': {error}") from None
    return network.eval()
