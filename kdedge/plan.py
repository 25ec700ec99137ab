"""Recipe -> the stages that carry it out, with their content keys and parents. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from kdedge.data.catalog import DATASETS
from kdedge.errors import DataError
from kdedge.models.catalog import find
from kdedge.recipe import Recipe
from kdedge.recipe_images import Data

# Part of every key. Raise it when the meaning of a stage changes: a new initialisation, order of batches, view, loss.
TRAINING_FORMAT = 1


Kind = Literal["synthesize", "fit", "merge", "improve", "fine-tune"]


@dataclass(frozen=True)
class Stage:
    """One training stage. Two stages with the same key would give the same weights, byte for byte, where device, torch and
    number of threads are the same too.
    """

    name: str  # "fit students", "fine-tune students.head"
    kind: Kind
    network: str
    parents: tuple[str, ...]  # names of the stages whose weights it reads
    key: str  # hex SHA-256 of config, parents' keys, data and seed

    @property
    def folder(self) -> str:
        """Folder of the finished stage, relative to the run."""
        return f"stages/{self.name.replace(' ', '-')}-{self.key[:16]}"


def plan(recipe: Recipe, data_fingerprint: str) -> list[Stage]:
    """The stages of a recipe, parents first. `data_fingerprint` stands for the images, labels and splits."""
    stages: dict[str, Stage] = {}
    last: dict[str, Stage] = {}  # the stage that gives a network its final weights

    def add(name: str, kind: Kind, network: str, parents: list[Stage], config: Any) -> None:
        content = {
            "training_format": TRAINING_FORMAT,
            "kind": kind,
            "network": network,  # equal networks under two names are two draws, not one
            "config": config,
            "parents": [parent.key for parent in parents],
            "data": data_fingerprint,
            "seed": recipe.seed,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        stages[name] = last[network] = Stage(name, kind, network, tuple(parent.name for parent in parents), key)

    for name in in_order(recipe):
        network = recipe.networks[name]
        parents = [last[source] for source in network.sources]
        if network.members is not None:
            add(f"merge {name}", "merge", name, parents, network.model_dump(mode="json"))
            continue
        if (made := network.impressions) is not None:
            add(f"synthesize {name}.impressions", "synthesize", name, [last[made.source]], made.model_dump())
            parents.append(last[name])
        config = network.model_dump(  # without what has a stage of its own
            mode="json",
            by_alias=True,
            exclude={"impressions": True, "improve": True, "head": {"fine_tune_epochs", "fine_tune_lr"}},
        )
        add(f"fit {name}", "fit", name, parents, config)
        if network.improve is not None:
            add(f"improve {name}", "improve", name, [last[name], *parents], network.improve.model_dump())
        if network.head is not None and network.head.fine_tune_epochs:
            # Batch size and the like are in the parent's key already.
            tune = network.head.model_dump(include={"fine_tune_epochs", "fine_tune_lr"})
            add(f"fine-tune {name}.head", "fine-tune", name, [last[name]], tune)
    return list(stages.values())


def in_order(recipe: Recipe) -> list[str]:
    """Names of the networks, every source before those that learn from it, otherwise as the recipe has them."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name not in done:
            for source in recipe.networks[name].sources:
                visit(source)
            done.append(name)

    for name in recipe.networks:
        visit(name)
    return done


def parameters(recipe: Recipe, name: str) -> int:
    """Parameters of a network: its members and its head."""
    classes = len(DATASETS[recipe.data.name].classes)
    return _of_members(recipe, name) + (recipe.dense(name) + 1) * classes


def sizes_to_print(recipes: Sequence[Recipe]) -> list[str]:
    """A line for each size of a network, with the variants that have it where others have another."""
    variants_of: dict[tuple[str, int], dict[str, None]] = {}
    for recipe in recipes:
        for name in recipe.networks:
            variants_of.setdefault((name, parameters(recipe, name)), {})[recipe.variant or ""] = None
    every = {recipe.variant for recipe in recipes}
    return [
        f"  {name}: {size:,} parameters" + (f" in {', '.join(variants)}" if len(variants) < len(every) else "")
        for (name, size), variants in variants_of.items()
    ]


def _of_members(recipe: Recipe, name: str) -> int:
    """Parameters of all members of a network, or of one member of an ensemble."""
    network = recipe.networks.get(name)
    if network is not None and network.members is not None:
        return sum(_of_members(recipe, member) for member in network.members)
    models = recipe.models(name)
    if network is not None and (improve := network.improve) is not None:  # whichever they are: all were of one model
        models = (*models[improve.worst :], *(improve.model,) * improve.worst)
    return sum(info.parameters for model in models if (info := find(model)) is not None)


def runs_that_have(folder: str, runs: Path) -> list[Path]:
    """The runs in `runs` in which `folder`, a path relative to a run, is finished; others take it over from there."""
    depth = len(Path(folder).parts)
    return [path.parents[depth - 1] for path in sorted([*runs.glob(f"*/{folder}"), *runs.glob(f"*/*/{folder}")])]


def describe(recipes: Sequence[Recipe], runs: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    """The plan of each run as `kdedge plan` shows it: its stages with their keys, and what has to be done for them.

    A stage is `finished` in the run's own folder, or will be taken over, finished, from another run in `runs`
    (`taken_over_from`), or will have been made for an earlier one of these runs (`shared_with`, its name). Without the data
    there are no keys; then they are null and `note` says why. Nothing is downloaded. Raises DataError when the data cannot
    be cut as a recipe says.
    """
    first: dict[str, str] = {}  # the run that makes a stage, by the stage's folder
    fingerprint_of = cache(_fingerprint)  # for as long as this call: the files may change
    documents = []
    for recipe in recipes:
        fingerprint, note = fingerprint_of(recipe.data, data_dir)
        stages = []
        for stage in plan(recipe, fingerprint or recipe.data.model_dump_json()):
            finished = fingerprint is not None and (runs / recipe.name / stage.folder).is_dir()
            others = runs_that_have(stage.folder, runs) if fingerprint is not None and not finished else []
            made_for = first.setdefault(stage.folder, recipe.name)
            stages.append(
                {
                    "name": stage.name,
                    "kind": stage.kind,
                    "network": stage.network,
                    "parents": list(stage.parents),
                    "trains_with": recipe.networks[stage.network].fit.partner if stage.kind == "fit" else None,
                    "key": stage.key if fingerprint else None,
                    "finished": finished,
                    "taken_over_from": str(others[0]) if others else None,
                    "shared_with": made_for if made_for != recipe.name and not finished and not others else None,
                }
            )
        sizes = {name: parameters(recipe, name) for name in recipe.networks}
        documents.append({"recipe": recipe.resolved(), "parameters": sizes, "stages": stages, "note": note})
    return documents


def rows_to_print(document: dict[str, Any]) -> list[list[str]]:
    """The stages of a plan that `describe` gave: name, key, what has to be done, and after which others."""
    rows = []
    for stage in document["stages"]:
        state = "finished" if stage["finished"] else "to do"
        if stage["taken_over_from"]:
            state = f"taken over from {stage['taken_over_from']}"
        elif stage["shared_with"]:
            state = f"shared with {stage['shared_with']}"
        partner = f"fit {stage['trains_with']}"
        others = [parent for parent in stage["parents"] if parent != partner]
        when = [f"with {partner}"] if stage["trains_with"] else []
        when += [f"after {', '.join(others)}"] if others else []
        rows.append([stage["name"], (stage["key"] or "-")[:12], state, ", ".join(when)])
    return rows


def _fingerprint(wanted: Data, data_dir: Path | None) -> tuple[str | None, str | None]:
    """What stands for images, labels and splits in the keys; or None and why there is none."""
    from kdedge.data.load import load  # needs numpy, which the rest of this file does not
    from kdedge.data.splits import split

    try:
        data = load(wanted.name, data_dir, wanted.as_, download=False)
    except DataError as error:
        return None, f"Without the data the stages have no keys yet. {error}"
    cut = split(len(data.train_labels), wanted.split_seed, wanted.validation, wanted.calibration, wanted.limit)
    return f"{data.fingerprint}/{cut.fingerprint}", None
