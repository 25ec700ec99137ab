"""The one training loop. Teacher, assistant, student, group and merge head differ in the model and in the lessons."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from kdedge.data.batches import Batch, Samples, batches, normalise, stable_seed
from kdedge.errors import RunError, TrainingError
from kdedge.losses import Lesson
from kdedge.machine import multiplies_bf16
from kdedge.models.network import Network
from kdedge.quantize.layers import QuantizedLinear
from kdedge.recipe import Fit
from kdedge.store import write_bytes
from kdedge.targets import Targets, Training, compute

CHECK_EVERY_STEPS = 20  # reading a loss waits for the device, so losses are looked at this often
VALIDATION_BATCH = 500


@dataclass(frozen=True)
class Taught:
    """A lesson, whom it learns from, and what it learns itself while it teaches."""

    lesson: Lesson
    source: Targets | None = None  # None: the labels, or the peers
    parts: nn.ParameterDict = field(default_factory=nn.ParameterDict)


@dataclass(frozen=True)
class Learner:
    """A network that trains, what it learns, and how."""

    network: Network
    taught: Sequence[Taught]
    settings: Fit
    seed: int  # of the order of batches and of dropout
    frozen: Targets | None = None  # the dense vectors of its finished members, where only the head learns
    shown: Training | None = None  # where those that train with it see what it gives

    @property
    def learning(self) -> nn.ModuleList:
        """All that its steps change."""
        return nn.ModuleList([self.network, *(one.parts for one in self.taught)])


@dataclass(frozen=True)
class Seen:
    """What the loop shows to whoever watches."""

    epoch: int  # from 1
    epochs: int
    step: int  # done, over all epochs
    steps: int
    loss: float  # mean over this epoch so far
    images_per_s: float  # times the number of members, so that groups of all sizes compare
    validation_accuracy: float | None = None  # percent, at the end of an epoch


@dataclass
class _State:
    """What a checkpoint holds beside weights and optimizer."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of this epoch, in each step that of each learner
    history: list[dict[str, float]] = field(default_factory=list)  # in each epoch an entry of each learner
    spent_s: float = 0.0  # on this epoch


def fit(
    learners: Sequence[Learner],
    train: Samples,
    validation: Samples,
    *,
    checkpoint: Path,
    checkpoint_every_s: float,
    watch: Callable[[Seen], None],
    stop: Callable[[], bool],
) -> list[list[dict[str, float]]]:
    """Train the networks of `learners` in place; returns, of each, loss, validation accuracy in percent and seconds of each
    epoch.

    The objective is the weighted sum of the lessons, whose parts learn along, and that summed over the members of an
    ensemble and over the learners. Mostly there is one. Several take the same steps, in the batches of the first one; each
    may learn from those before it, to which nothing flows back, so the first one ends as it would alone, byte for byte.

    Order and views are pure functions of seed, epoch and sample: a run that was killed goes on from `checkpoint` and ends
    in the same bytes. When `stop` says so, it saves and raises KeyboardInterrupt. What `watch` sees is the last learner.
    Raises TrainingError when a loss or a weight is not a finite number.
    """
    first, count, device = learners[0], len(learners), train.images.device
    settings = first.settings
    # torch.manual_seed seeds every kind of device, and takes a third of a millisecond for it.
    seed_device = torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    learning = nn.ModuleList(part for learner in learners for part in learner.learning)
    optimizer, paces = _optimizer(learners)
    epoch_steps = math.ceil(len(train) / settings.batch_size)
    steps = settings.epochs * epoch_steps
    state = _resume(checkpoint, learning, optimizer)
    live = any(one.source is not None and one.source.needs_images for one in first.taught)  # it needs all cores
    pending: list[Tensor] = []  # losses still on the device
    began = saved_at = time.monotonic()
    first_step = state.step
    known = [_given_by_frozen(learner, validation) for learner in learners]

    def show(accuracy: float | None = None) -> None:
        images = min((state.step - first_step) * settings.batch_size, settings.epochs * len(train))
        rate = images * sum(len(learner.network.members) for learner in learners) / (time.monotonic() - began)
        loss = _mean(state.losses[count - 1 :: count]) if state.losses else math.nan
        watch(Seen(epoch + 1, settings.epochs, state.step, steps, loss, rate, accuracy))

    for epoch in range(state.step // epoch_steps, settings.epochs):
        for learner in learners:
            learner.network.train()
            if learner.frozen is not None:
                learner.network.members.eval()  # they keep their batch norm as it is, and drop nothing
        started = time.monotonic() - state.spent_s
        order = batches(len(train), train.views, settings.batch_size, seed=first.seed, epoch=epoch, device=device)
        with nullcontext() if live or first.frozen is not None else first.network.side_by_side():
            for batch in order[state.step % epoch_steps :]:
                for group, pace in zip(optimizer.param_groups, paces, strict=True):
                    group["lr"] = lr_at(pace, state.step, steps) * group["factor"]
                losses = torch.stack([_loss(learner, train, batch, state.step, seed_device) for learner in learners])
                optimizer.zero_grad()
                losses.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                state.step += 1
                pending.append(losses.detach())
                stopping = stop()
                if len(pending) == CHECK_EVERY_STEPS or state.step % epoch_steps == 0 or stopping:
                    _read(pending, state, learners, steps, checkpoint)
                    show()
                    if state.step % epoch_steps and (stopping or time.monotonic() - saved_at > checkpoint_every_s):
                        _check_weights(learners, state, steps, checkpoint)
                        state.spent_s = time.monotonic() - started
                        _save(checkpoint, learning, optimizer, state)
                        saved_at = time.monotonic()
                if stopping and state.step % epoch_steps:
                    raise KeyboardInterrupt
        _check_weights(learners, state, steps, checkpoint)
        reached = [accuracy(one.network, validation, dense) for one, dense in zip(learners, known, strict=True)]
        show(reached[-1])
        seconds = time.monotonic() - started
        state.history += [
            {"loss": _mean(state.losses[number::count]), "validation_accuracy": percent, "seconds": seconds}
            for number, percent in enumerate(reached)
        ]
        state.losses, state.spent_s = [], 0.0
        if state.step < steps and (stop() or time.monotonic() - saved_at > checkpoint_every_s):
            _save(checkpoint, learning, optimizer, state)
            saved_at = time.monotonic()
            if stop():
                raise KeyboardInterrupt
    for learner in learners:
        learner.network.eval()
    return [state.history[number::count] for number in range(count)]


def _loss(learner: Learner, data: Samples, batch: Batch, step: int, seed_device: Callable[[int], object]) -> Tensor:
    """The objective of one learner in one step, a scalar."""
    seed_device(stable_seed(learner.seed, "step", step))  # for dropout
    given = not_dropped(learner.taught, stable_seed(learner.seed, "drop", step))
    return objective(learner.network, given, data, batch, learner.frozen, learner.shown)


def _given_by_frozen(learner: Learner, data: Samples) -> Tensor | None:
    """The dense vectors of frozen members, float32 [N, width], which are the same after every epoch."""
    if learner.frozen is None:
        return None
    return compute(learner.network.eval(), data, ["dense"], lambda done, total: None).outputs["dense"][0]


def not_dropped(taught: Sequence[Taught], seed: int) -> Sequence[Taught]:
    """What is taught in one step: of a lesson with `drop`, so many of its sources are left out, drawn by `seed` alone.

    Random drop of guides, Son et al. 2021. The sources of one lesson follow one another, with one and the same lesson.
    """
    if all(one.lesson.drop is None for one in taught):  # asked in each step, and true of nearly all recipes
        return taught
    generator = torch.Generator().manual_seed(seed)
    left: list[Taught] = []
    for _, of_lesson in groupby(taught, key=lambda one: id(one.lesson)):
        several = list(of_lesson)
        if drop := several[0].lesson.drop:
            drawn = torch.randperm(len(several), generator=generator)[drop:]
            several = [several[n] for n in sorted(drawn.tolist())]
        left += several
    return left


def objective(
    network: Network,
    taught: Sequence[Taught],
    data: Samples,
    batch: Batch,
    frozen: Targets | None = None,
    shown: Training | None = None,
) -> Tensor:
    """Weighted sum of the lessons on one batch, a scalar. A live teacher runs once, for all siblings and lessons
    (once more for what another network leaves over of it).

    It is summed over the members of an ensemble, so each gets the gradient that it would get alone; its peers are what
    the others give on this batch. What it gives is left in `shown`.
    """
    sources = {id(one.source): one.source for one in taught if one.source is not None}
    labels = data.labels[batch.samples]
    images = None
    if any(source is None or source.needs_images for source in (frozen, *sources.values())):
        images = data.seen(batch.samples, batch.views)
    known = {number: source(batch, images) for number, source in sources.items()}
    dense = None if frozen is None else frozen(batch, images)["dense"]
    # Everything after the network is float32 again. What lies on a grid of integers would leave it in bfloat16.
    bf16 = multiplies_bf16(labels.device) and not isinstance(network.head, QuantizedLinear)
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
        if dense is not None:
            seen = {"dense": dense}
        else:
            assert images is not None
            layers = {one.lesson.output for one in taught if one.lesson.what == "features"}
            seen = network.outputs(images, layers.union(shown.layers if shown else ()))
        learners = network.learners(seen.pop("dense"))
        outputs = {name: [maps.float()] for name, maps in seen.items()}
        outputs["dense"] = [own.float() for own, _ in learners]
        if shown is not None or any(one.lesson.what == "logits" for one in taught):
            outputs["logits"] = [head(own).float() for own, head in learners]
    if shown is not None:
        shown.show(outputs)
    total = labels.new_zeros((), dtype=torch.float32)
    for one in taught:
        lesson, given = one.lesson, outputs[one.lesson.output]
        for number, own in enumerate(given):
            if lesson.source == "peers":
                targets = [other.detach() for other in given[:number] + given[number + 1 :]]
            else:
                targets = [labels if one.source is None else known[id(one.source)][lesson.target]]
            for target in targets:
                total = total + lesson.weight / len(targets) * lesson(own, target, labels, **one.parts)
    return total


def accuracy(network: Network, data: Samples, dense: Tensor | None = None) -> float:
    """Share of `data`, as it is (view 0), whose label gets the highest logit, in percent.

    `dense` is what the members give of it, float32 [N, width], where that was computed before: then only the head runs.
    """
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=data.images.device)
    with torch.no_grad():
        for first in range(0, len(data), VALIDATION_BATCH):
            part = slice(first, first + VALIDATION_BATCH)
            logits = network(normalise(data.images[part], data.info)) if dense is None else network.head(dense[part])
            right += (logits.argmax(1) == data.labels[part]).sum()
    return 100 * right.item() / len(data)


def lr_at(settings: Fit, step: int, steps: int) -> float:
    """Learning rate of step 0 <= step < steps: a linear warm-up, then constant or half a cosine down to zero."""
    warm = settings.warmup * steps
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _optimizer(learners: Sequence[Learner]) -> tuple[torch.optim.Optimizer, list[Fit]]:
    """Over all weights, and the lessons' parts, with whose settings each group of them learns. Those that no lesson reaches
    (frozen members, a head without logits) get no gradient, and an optimizer of torch's leaves such weights as they are,
    without decay."""
    groups: list[dict[str, Any]] = []
    paces: list[Fit] = []
    for learner in learners:
        own: list[dict[str, Any]] = [{"params": list(learner.network.parameters()), "factor": 1.0}]
        parts = [(list(one.parts.values()), one.lesson.parts_lr) for one in learner.taught if one.parts]
        own += [{"params": values, "factor": factor} for values, factor in parts]
        how: dict[str, Any] = {"weight_decay": learner.settings.weight_decay}
        if learner.settings.optimizer == "sgd":
            how |= {"momentum": learner.settings.momentum, "nesterov": learner.settings.momentum > 0}
        groups += [group | how for group in own]
        paces += [learner.settings] * len(own)
    settings = learners[0].settings  # its optimizer is that of all
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, fused=True), paces
    return torch.optim.AdamW(groups, settings.lr, fused=True), paces


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _read(pending: list[Tensor], state: _State, learners: Sequence[Learner], steps: int, checkpoint: Path) -> None:
    """Move the pending losses into the state. Raises TrainingError at the first that is not a number."""
    rows = torch.stack(pending).tolist()
    for step, row in enumerate(rows, state.step - len(rows)):
        for learner, value in zip(learners, row, strict=True):
            if not math.isfinite(value):
                raise _diverged(f"The loss became {value}", step, learner.settings, steps, checkpoint)
        state.losses += row
    pending.clear()


def _check_weights(learners: Sequence[Learner], state: _State, steps: int, checkpoint: Path) -> None:
    """A finite loss may still end in weights that are not; those are neither kept nor called finished."""
    for learner in learners:
        if not all(tensor.isfinite().all() for tensor in learner.learning.state_dict().values()):
            raise _diverged("A weight became infinite or nan", state.step - 1, learner.settings, steps, checkpoint)


def _diverged(what: str, step: int, settings: Fit, steps: int, checkpoint: Path) -> TrainingError:
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint.is_file() else "No checkpoint was made yet."
    return TrainingError(
        f"{what} at step {step + 1} of {steps} (epoch {step * settings.epochs // steps + 1}), "
        f"learning rate {lr_at(settings, step, steps):.3g}. {kept} Try a lower `lr`, or a `warmup`."
    )


def _save(checkpoint: Path, learning: nn.Module, optimizer: torch.optim.Optimizer, state: _State) -> None:
    content = io.BytesIO()
    torch.save({"weights": learning.state_dict(), "optimizer": optimizer.state_dict(), **asdict(state)}, content)
    write_bytes(checkpoint, content.getvalue())


def _resume(checkpoint: Path, learning: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    """Weights, optimizer and state of the checkpoint, if there is one."""
    if not checkpoint.is_file():
        return _State()
    try:
        saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        learning.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        return _State(saved["step"], saved["losses"], saved["history"], saved["spent_s"])
    except (OSError, EOFError, UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        # torch's own words advise to load it unsafely, so they are left out.
        what = type(error).__name__
        raise RunError(f"{checkpoint} is damaged ({what}). Delete it to start this stage again.") from None
