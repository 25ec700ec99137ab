"""Who learns in a stage: the network as it starts, its lessons, and what they are learned from."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdedge.data.batches import Samples, stable_seed
from kdedge.data.catalog import DatasetInfo
from kdedge.errors import TrainingError
from kdedge.fit import Learner, Taught
from kdedge.losses import Lesson
from kdedge.losses.dense import MSE
from kdedge.losses.logits import KD, CrossEntropy
from kdedge.models.network import Network
from kdedge.networks import finished_network, new_network, new_parts, with_new_members
from kdedge.plan import Stage
from kdedge.quantize.layers import quantized_network
from kdedge.recipe import Fit
from kdedge.targets import Cached, Live, Rest, Targets, Training, compute, targets
from kdedge.work import Work, take_over


def learner(work: Work, stage: Stage, scratch: Path, shown: Mapping[str, Training]) -> tuple[Learner, dict[str, Any]]:
    """Who learns in a stage, and what the stage's record says of it.

    A head that is fine-tuned learns from its members' outputs, which are kept in `scratch`. `shown` are the networks that
    take the same steps, by their names: where this one is among them, there it shows what it gives.
    """
    network, known = _started(work, stage)
    described, images = work.recipe.networks[stage.network], work.seen_by(stage.network)
    seed = stable_seed(work.recipe.seed, stage.network, stage.kind)
    if stage.kind == "fine-tune":
        assert described.head is not None
        epochs, lr = described.head.fine_tune_epochs, described.head.fine_tune_lr
        settings = Fit(epochs=epochs, lr=lr, batch_size=described.fit.batch_size)
        taught = [Taught(CrossEntropy())]  # on the labels, the students frozen (Malik et al. 2021, Eq. 6)
        frozen = _outputs(work, stage, stage.network, network, ["dense"], scratch, epochs)
        return Learner(network, taught, settings, seed, frozen), known
    _check_last_batch(network, len(images), described.fit.batch_size, stage.network)
    taught = _lessons(work, stage, shown)
    return Learner(network, taught, described.fit, seed, shown=shown.get(stage.network)), known


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


def _check_last_batch(network: Network, images: int, size: int, name: str) -> None:
    """Batch norm cannot learn from one image alone. Raises TrainingError."""
    if (images % size or size) == 1 and any(
        isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules()
    ):
        raise TrainingError(
            f"networks.{name}.fit.batch_size: {size:,} leaves one of {images:,} images alone in the last batch, and batch norm "
            "learns nothing from one image. Choose another batch size."
        )


def _lessons(work: Work, stage: Stage, shown: Mapping[str, Training]) -> list[Taught]:
    """What the network of a stage learns, and from what."""
    described = work.recipe.networks[stage.network]
    sources: dict[str, Cached | Live | Training] = {**shown}
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


def _learned(lesson: Lesson, source: str, outputs: Mapping[str, Cached | Live | Training]) -> Targets | None:
    """What a lesson learns of `source`; None of the labels, and of peers."""
    minus = lesson.minus if isinstance(lesson, MSE) else None
    return outputs.get(source) if minus is None else Rest(outputs[source], outputs[minus])


def _improved(work: Work, stage: Stage) -> tuple[Network, dict[str, Any]]:
    """The finished group with fresh members where it was worst, and which these are."""
    improve = work.recipe.networks[stage.network].improve
    assert improve is not None
    network = finished_network(work.run, work.recipe, stage.network, stage.parents[0]).to(work.train.images.device)
    losses = losses_of_members(work, stage, {stage.network: network})["member_losses"]
    replaced = sorted(sorted(range(len(losses)), key=lambda n: -losses[n])[: improve.worst])
    said = ", ".join(f"{stage.network}.{n} (loss {losses[n]:.4f})" for n in replaced)
    work.progress.note(f"{stage.name}: {improve.model} replaces {said}")
    return with_new_members(network, replaced, work.recipe, stage.network), {"replaced": replaced}


def losses_of_members(work: Work, stage: Stage, trained: Mapping[str, Network]) -> dict[str, list[float]]:
    """The loss of each member on the validation images, if it has one of its own and was trained in this stage, alone or
    with others that are in `trained` too."""
    described = work.recipe.networks[stage.network]
    if stage.kind == "fine-tune" or not described.learns_in_chunks:
        return {}
    whole = [lesson.model_copy(update={"drop": None}).share() for lesson in described.learns]
    lessons = [(lesson, source) for lesson in whole for source in lesson.sources]
    teachers = {source: trained.get(source) or work.finished(source)[0] for _, source in lessons}
    taught = [(lesson, teachers[source]) for lesson, source in lessons]
    return {"member_losses": member_losses(trained[stage.network], taught, work.validation)}


def member_losses(network: Network, teachers: Sequence[tuple[Lesson, Network]], data: Samples) -> list[float]:
    """Loss of each member's own chunk of the dense vector on `data`, as it is (Malik et al. 2021, Tables 1 and 4)."""

    def chunks(of: Network) -> tuple[Tensor, ...]:
        made = compute(of, data, ["dense"], progress=lambda done, total: None)
        return made.outputs["dense"][0].chunk(len(network.members), 1)

    learned = chunks(network)
    given = {id(teacher): chunks(teacher) for _, teacher in teachers}
    losses = [
        sum(lesson.weight * lesson(learned[n], given[id(teacher)][n], data.labels) for lesson, teacher in teachers)
        for n in range(len(network.members))
    ]
    return [float(loss) for loss in losses]


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
