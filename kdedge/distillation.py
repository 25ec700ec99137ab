"""The story of `distill`: for each stage of the plan that is not finished, run it and commit it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdedge import store
from kdedge.data.batches import Samples
from kdedge.data.load import Dataset, load
from kdedge.data.splits import Splits, split
from kdedge.errors import Interrupted, KdedgeError
from kdedge.machine import chosen_device, interruptible, keep_freed_memory
from kdedge.plan import Stage, plan
from kdedge.progress import Quiet
from kdedge.recipe import Recipe
from kdedge.stages import carry_out
from kdedge.variants import quick as made_quick
from kdedge.work import Work, take_over


def distill(
    recipe: Recipe,
    *,
    runs: Path | str = "runs",
    device: str = "auto",
    data_dir: Path | None = None,
    quick: bool = False,
    checkpoint_every_s: float = 30.0,
    progress: Quiet | None = None,
) -> store.Run:
    """Carry out the recipe in the folder `runs`/<recipe name>, going on from whatever is finished there.

    `device` is auto, cpu or cuda; `quick` takes a small subset and few steps, to try the chain. Raises KdedgeError.
    """
    if recipe.seeds or (recipe.variants and recipe.variant is None):
        raise KdedgeError(f"{recipe.name} describes several runs; kdedge.load_recipes(...) gives each of them")
    progress = progress or Quiet()
    store.check_place(Path(runs) / recipe.name)
    recipe = made_quick(recipe) if quick else recipe
    compute = chosen_device(device)
    wanted = recipe.data
    dataset = load(wanted.name, data_dir, wanted.as_)
    cut = split(len(dataset.train_labels), wanted.split_seed, wanted.validation, wanted.calibration, wanted.limit)
    stages = plan(recipe, f"{dataset.fingerprint}/{cut.fingerprint}")
    run = _describe(Path(runs) / recipe.name, recipe, quick, dataset, cut, stages)
    keep_freed_memory()
    with store.lock(run.path), interruptible() as stop:
        run.write()
        store.sweep(run.path)
        train, validation = (
            Samples.to(compute, dataset.train_images[part], dataset.train_labels[part], dataset.info)
            for part in (cut.train, cut.validation)
        )
        work = Work(Path(runs), run, recipe, stages, train, validation, checkpoint_every_s, progress, stop)
        done: list[Stage] = []
        for stage in stages:
            if stage in done:
                continue  # it came out of the fit of the network that it trains with
            if (run.path / stage.folder).is_dir():
                progress.note(f"{stage.name}: finished before")
            elif found := take_over(work, stage.folder):
                progress.note(f"{stage.name}: taken over from {found}")
            else:
                done += carry_out(work, stage)
            if stop():  # not every stage looks; the last one must not hide it from whoever goes on to the next run
                raise Interrupted(f"Stopped after '{stage.name}'. Run the same command again to go on from there.")
    return run


def _describe(path: Path, recipe: Recipe, quick: bool, dataset: Dataset, cut: Splits, stages: list[Stage]) -> store.Run:
    data = {
        "name": dataset.name,
        **({"as": recipe.data.as_} if recipe.data.as_ else {}),
        "origin": dataset.origin,
        "fingerprint": dataset.fingerprint,
        "train": len(cut.train),
        "test": len(dataset.test_labels),
        "validation": cut.validation.tolist(),
        "calibration": cut.calibration.tolist(),
    }
    return store.Run(
        name=recipe.name,
        quick=quick,
        recipe=recipe.resolved(),
        data=data,
        stages=[
            store.StageRecord(name=stage.name, network=stage.network, key=stage.key, folder=stage.folder)
            for stage in stages
        ],
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("kdedge", "torch", "numpy")},
        },
        path=path,
    )


def summary(run: store.Run) -> dict[str, Any]:
    """What `distill` says of a finished run: each network's size and validation accuracy, and the record of each stage."""
    records = [store.read_document(run.stage(stage.name) / "stage.json") for stage in run.stages]
    networks: dict[str, dict[str, Any]] = {}  # what a later stage of the same network says replaces the earlier one's
    for stage, record in zip(run.stages, records, strict=True):
        said = networks.setdefault(stage.network, {"name": stage.network})
        said |= {key: record[key] for key in ("parameters", "models", "replaced", "member_losses") if key in record}
        if "history" in record:
            said["validation_accuracy"] = record["history"][-1]["validation_accuracy"]
    return {
        "recipe": run.name,
        "run": str(run.path),
        "quick": run.quick,
        "seed": run.recipe["seed"],
        "data": {key: value for key, value in run.data.items() if not isinstance(value, list)},
        "networks": list(networks.values()),
        "stages": records,
    }


def lines_to_print(document: dict[str, Any]) -> Iterator[str]:
    """The networks of a summary: how good and how large each is, and how well the members of a group learned."""
    for network in document["networks"]:
        accuracy = f"{network['validation_accuracy']:.2f}% on validation"
        yield f"{network['name']}: {accuracy}, {network['parameters']:,} parameters"
        if losses := network.get("member_losses"):
            yield f"  loss of each member: {' '.join(f'{loss:.4f}' for loss in losses)}"
