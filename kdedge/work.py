"""What the stages of one run share: its recipe, its images, what is finished, and what other runs have finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdedge import store
from kdedge.data.batches import Samples, Views
from kdedge.impressions import read_impressions
from kdedge.models.network import Network
from kdedge.networks import finished_network
from kdedge.plan import Stage, runs_that_have
from kdedge.progress import Quiet
from kdedge.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """Everything that the stages of one run share."""

    runs: Path
    run: store.Run
    recipe: Recipe
    stages: list[Stage]
    train: Samples
    validation: Samples
    checkpoint_every_s: float
    progress: Quiet
    stop: Callable[[], bool]

    def seen_by(self, network: str) -> Samples:
        """The images that `network` is trained on, with its augmentation."""
        described = self.recipe.networks[network]
        seen = self.train if described.impressions is None else self._impressions(network)
        seen = seen.part(**described.view.part) if described.view else seen
        return replace(seen, views=Views(described.fit.augment.flip, described.fit.augment.shift))

    def _impressions(self, network: str) -> Samples:
        """The images that were made for `network`. No lesson that may learn on them looks at the labels, which are 0."""
        images = read_impressions(self.run.stage(f"synthesize {network}.impressions"))
        return Samples.to(self.train.images.device, images, np.zeros(len(images), np.int64), self.train.info)

    def finished(self, network: str) -> tuple[Network, Stage]:
        """A network that others learn from, on the compute device, and the stage that gave it its final weights."""
        stage = [stage for stage in self.stages if stage.network == network][-1]
        return finished_network(self.run, self.recipe, network, stage.name).to(self.train.images.device), stage

    def has(self, stage: Stage) -> bool:
        """Whether a stage is finished, or is in another run, from which it will be taken over."""
        return (self.run.path / stage.folder).is_dir() or bool(runs_that_have(stage.folder, self.runs))


def take_over(work: Work, relative: str) -> Path | None:
    """The same finished folder of another run, linked or copied into this one; the other's path, or None.

    What was damaged there is passed over, so that it can be made anew here.
    """
    for run in runs_that_have(relative, work.runs):
        other = run / relative
        if not store.is_unchanged(other):
            work.progress.note(f"{other} is damaged and not taken over")
            continue
        with store.new_folder(work.run.path / relative) as folder:
            shutil.copytree(other, folder, copy_function=_link, dirs_exist_ok=True)
        return other
    return None


def _link(source: str, target: str) -> None:
    """Finished files are never written again, so a hard link is as good as a copy; not every file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
