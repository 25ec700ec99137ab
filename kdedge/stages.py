"""One stage of a plan: what it needs is made ready, it is carried out, and it is committed, or taken over from another run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kdedge import store
from kdedge.data.batches import Samples, Views, stable_seed
from kdedge.data.catalog import DatasetInfo
from kdedge.errors import Interrupted, TrainingError
from kdedge.fit import Seen, Taught, accuracy, fit, member_losses
from kdedge.impressions import read_impressions, synthesize, write_impressions
from kdedge.losses import Lesson
from kdedge.losses.dense import MSE
from kdedge.losses.logits import KD, CrossEntropy
from kdedge.models.network import Network, count_parameters, merged
from kdedge.networks import finished_network, new_network, new_parts, with_new_members
from kdedge.plan import Stage, runs_that_have
from kdedge.progress import Quiet
from kdedge.quantize.layers import quantized_network
from kdedge.recipe import Fit, Recipe
from kdedge.rules.merge import split_name
from kdedge.targets import Cached, Live, Rest, Targets, targets


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


# What a stage leaves: how to write its files into a folder, which gives their hashes; and what else its record says.
Made = tuple[Callable[[Path], dict[str, str]], dict[str, Any]]


def carry_out(work: Work, stage: Stage) -> None:
    """Do one stage and commit it: its folder appears whole, and only then does its checkpoint go."""
    began = time.monotonic()
    checkpoint = work.run.path / f"{stage.folder}.checkpoint"
    scratch = work.run.path / f"{stage.folder}.dense"  # the frozen members' outputs, of use to this stage alone
    try:
        if stage.kind == "synthesize":
            write, known = _synthesized(work, stage, checkpoint)
        elif stage.kind == "merge":
            write, known = _merged(work, stage)
        else:
            write, known = _trained(work, stage, checkpoint, scratch)
    except KeyboardInterrupt:
        kept = [other.name for other in work.stages if (work.run.path / other.folder).is_dir()]
        kept += [f"'{stage.name}' up to its last checkpoint"] if checkpoint.is_file() else []
        raise Interrupted(
            f"Stopped in '{stage.name}'. Kept in {work.run.path}: {', '.join(kept) or 'nothing yet'}. "
            "Run the same command again to go on from there."
        ) from None
    finally:
        work.progress.finish()
    with store.new_folder(work.run.path / stage.folder) as folder:
        record = {
            "name": stage.name,
            "key": stage.key,
            "parents": list(stage.parents),
            **write(folder),
            "seconds": round(time.monotonic() - began, 1),
            **known,  # what was trained or synthesized knows better: others may have begun it, before a stop
            "device": str(work.train.images.device),
            "versions": work.run.versions,
        }
        store.write_json(folder / "stage.json", record)
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


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


def _trained(work: Work, stage: Stage, checkpoint: Path, scratch: Path) -> Made:
    """A network, a group or a head, trained."""

    def watch(seen: Seen) -> None:
        reached = "" if seen.validation_accuracy is None else f" val {seen.validation_accuracy:.2f}%"
        detail = f"epoch {seen.epoch}/{seen.epochs} loss {seen.loss:.4f} {seen.images_per_s:,.0f} img/s{reached}"
        work.progress.update(stage.name, seen.step, seen.steps, detail)

    network, known = _started(work, stage)
    described, images = work.recipe.networks[stage.network], work.seen_by(stage.network)
    if stage.kind == "fine-tune":
        assert described.head is not None
        epochs, lr = described.head.fine_tune_epochs, described.head.fine_tune_lr
        settings = Fit(epochs=epochs, lr=lr, batch_size=described.fit.batch_size)
        taught = [Taught(CrossEntropy())]  # on the labels, the students frozen (Malik et al. 2021, Eq. 6)
        frozen = _outputs(work, stage, stage.network, network, ["dense"], scratch, epochs)
    else:
        _check_last_batch(network, len(images), described.fit.batch_size, stage.network)
        settings, taught, frozen = described.fit, _lessons(work, stage), None
    history = fit(
        network,
        taught,
        images,
        work.validation,
        settings,
        seed=stable_seed(work.recipe.seed, stage.network, stage.kind),
        checkpoint=checkpoint,
        checkpoint_every_s=work.checkpoint_every_s,
        watch=watch,
        stop=work.stop,
        frozen=frozen,
    )
    seconds = round(sum(epoch["seconds"] for epoch in history), 1)
    known |= {**_of_members(work, stage, network), "history": history, "seconds": seconds}
    return _network_made(network, known)


def _check_last_batch(network: Network, images: int, size: int, name: str) -> None:
    """Batch norm cannot learn from one image alone. Raises TrainingError."""
    if (images % size or size) == 1 and any(
        isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules()
    ):
        raise TrainingError(
            f"networks.{name}.fit.batch_size: {size:,} leaves one of {images:,} images alone in the last batch, and batch norm "
            "learns nothing from one image. Choose another batch size."
        )


def _network_made(network: Network, known: dict[str, Any]) -> Made:
    def write(folder: Path) -> dict[str, str]:
        store.save_tensors(folder / "weights.safetensors", network.state_dict())
        return {"weights_sha256": store.sha256(folder / "weights.safetensors")}

    return write, {"parameters": count_parameters(network.with_one_head()), "models": network.models, **known}


def _synthesized(work: Work, stage: Stage, checkpoint: Path) -> Made:
    """Images that are made from a finished network."""
    settings = work.recipe.networks[stage.network].impressions
    assert settings is not None
    teacher, _ = work.finished(settings.source)

    def watch(done: int, images: int, divergence: float, rate: float) -> None:
        work.progress.update(stage.name, done, images, f"divergence {divergence:.4f} {rate:,.1f} img/s")

    made = synthesize(
        teacher,
        work.train.info,
        settings,
        seed=stable_seed(work.recipe.seed, stage.network, stage.kind),
        checkpoint=checkpoint,
        checkpoint_every_s=work.checkpoint_every_s,
        watch=watch,
        stop=work.stop,
    )
    known = {
        "images": len(made.images),
        "divergence_noise": made.divergence_noise,
        "divergence": made.divergence,
        "seconds": round(made.seconds, 1),
    }
    return lambda folder: write_impressions(folder, made.images), known


def _started(work: Work, stage: Stage) -> tuple[Network, dict[str, Any]]:
    """The network that a stage trains, as it starts, and what the stage's record says of it."""
    described = work.recipe.networks[stage.network]
    if stage.kind == "improve":
        return _improved(work, stage)
    device = work.train.images.device
    if stage.kind == "fine-tune":
        return finished_network(work.run, work.recipe, stage.network, stage.parents[0]).to(device), {}
    quantize = described.quantize
    if quantize is not None and quantize.source is not None:
        network = work.finished(quantize.source)[0]
    else:
        network = new_network(work.recipe, stage.network).to(device)
    if described.head is not None:
        start = work.finished(described.head.source)[0].with_one_head().head
        for head in network.heads():
            head.load_state_dict({name: value.detach() for name, value in start.named_parameters()})
    if quantize is not None:
        network = quantized_network(network, quantize.weights, quantize.observe_steps).to(device)
    return network, {}


def _lessons(work: Work, stage: Stage) -> list[Taught]:
    """What the network of a stage learns, and from what."""
    described = work.recipe.networks[stage.network]
    sources: dict[str, Cached | Live] = {}
    for source in (source for lesson in described.learns for source in lesson.networks):
        if source not in sources:
            teacher, taught_by = work.finished(source)
            part = described.view.name if described.view else ""
            made = [other.key[:16] for other in work.stages if other.name == f"synthesize {stage.network}.impressions"]
            seen = "-".join(filter(None, [*made, work.seen_by(stage.network).views.name, part]))
            wanted = sorted({one.target for one in described.learns if source in one.networks})
            folder = f"targets/{taught_by.key[:16]}-{seen}-{'-'.join(wanted)}"
            if not (work.run.path / folder).is_dir():
                take_over(work, folder)
            path = work.run.path / folder
            sources[source] = _outputs(work, stage, source, teacher, wanted, path, described.fit.epochs)
    return [
        Taught(
            lesson,
            _learned(lesson, source, sources),
            new_parts(work.recipe, stage.network, number, source).to(work.train.images.device),
        )
        for number, lesson in enumerate(_numbered(lesson.share(), work.train.info) for lesson in described.learns)
        for source in lesson.sources
    ]


def _numbered(lesson: Lesson, data: DatasetInfo) -> Lesson:
    """The lesson with the numbers of the classes that it names."""
    if not isinstance(lesson, KD) or lesson.classes is None:
        return lesson
    return lesson.model_copy(update={"classes": tuple(map(data.class_number, lesson.classes))})


def _learned(lesson: Lesson, source: str, outputs: Mapping[str, Cached | Live]) -> Targets | None:
    """What a lesson learns of `source`; None of the labels, and of peers."""
    minus = lesson.minus if isinstance(lesson, MSE) else None
    return outputs.get(source) if minus is None else Rest(outputs[source], outputs[minus])


def _merged(work: Work, stage: Stage) -> Made:
    """The network that is made of finished ones, as the recipe says."""
    described = work.recipe.networks[stage.network]
    assert described.members is not None and described.merge is not None
    networks = []
    for name, number in map(split_name, described.members):
        network = work.finished(name)[0]
        networks.append(network if number is None else network.member(number))
    network = merged(networks, described.merge)
    reached = accuracy(network, work.validation)
    work.progress.note(f"{stage.name}: {reached:.2f}% on validation")
    return _network_made(network, {"history": [{"validation_accuracy": reached}]})


def _improved(work: Work, stage: Stage) -> tuple[Network, dict[str, Any]]:
    """The finished group with fresh members where it was worst, and which these are."""
    improve = work.recipe.networks[stage.network].improve
    assert improve is not None
    network = finished_network(work.run, work.recipe, stage.network, stage.parents[0]).to(work.train.images.device)
    losses = _of_members(work, stage, network)["member_losses"]
    replaced = sorted(sorted(range(len(losses)), key=lambda n: -losses[n])[: improve.worst])
    said = ", ".join(f"{stage.network}.{n} (loss {losses[n]:.4f})" for n in replaced)
    work.progress.note(f"{stage.name}: {improve.model} replaces {said}")
    return with_new_members(network, replaced, work.recipe, stage.network), {"replaced": replaced}


def _of_members(work: Work, stage: Stage, network: Network) -> dict[str, list[float]]:
    """The loss of each member on the validation images, if it has one of its own and was trained in this stage."""
    described = work.recipe.networks[stage.network]
    if stage.kind == "fine-tune" or not described.learns_in_chunks:
        return {}
    whole = [lesson.model_copy(update={"drop": None}).share() for lesson in described.learns]
    lessons = [(lesson, source) for lesson in whole for source in lesson.sources]
    teachers = {source: work.finished(source)[0] for _, source in lessons}
    taught = [(lesson, teachers[source]) for lesson, source in lessons]
    return {"member_losses": member_losses(network, taught, work.validation)}


def _outputs(
    work: Work, stage: Stage, name: str, network: Network, wanted: Collection[str], folder: Path, epochs: int
) -> Cached | Live:
    """The `wanted` outputs of the finished network `name` over the views of the network that `stage` trains."""
    began = time.monotonic()

    def watch(done: int, total: int) -> None:
        if work.stop():
            raise KeyboardInterrupt
        rate = done * len(network.members) / (time.monotonic() - began)
        work.progress.update(f"outputs of {name}", done, total, f"{rate:,.0f} img/s")

    return targets(network, work.seen_by(stage.network), folder, wanted=wanted, epochs=epochs, progress=watch)
