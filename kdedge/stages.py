"""One stage of a plan, carried out and committed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdedge import store
from kdedge.data.batches import stable_seed
from kdedge.errors import Interrupted
from kdedge.fit import Seen, accuracy, fit
from kdedge.impressions import synthesize, write_impressions
from kdedge.learners import learner, losses_of_members
from kdedge.machine import multiplies_bf16
from kdedge.models.network import Network, count_parameters, merged
from kdedge.plan import Stage
from kdedge.rules.merge import split_name
from kdedge.targets import Training
from kdedge.work import Work

# What a stage leaves: how to write its files into a folder, which gives their hashes; and what else its record says.
Made = tuple[Callable[[Path], dict[str, str]], dict[str, Any]]


def carry_out(work: Work, stage: Stage) -> list[Stage]:
    """Do one stage, with those that come out of the same fit, and commit them; returns them.

    The folder of each appears whole, and only then does their checkpoint go.
    """
    began = time.monotonic()
    together = _of_one_fit(work, stage)
    title = " + ".join([together[0].name, *(other.network for other in together[1:])])
    checkpoint = _checkpoint(work, together[-1])
    scratch = work.run.path / f"{stage.folder}.dense"  # the frozen members' outputs, of use to this stage alone
    try:
        if stage.kind == "synthesize":
            made = [_synthesized(work, stage, checkpoint)]
        elif stage.kind == "merge":
            made = [_merged(work, stage)]
        else:
            made = _trained(work, together, title, checkpoint, scratch)
    except KeyboardInterrupt:
        kept = [other.name for other in work.stages if (work.run.path / other.folder).is_dir()]
        kept += [f"'{title}' up to its last checkpoint"] if checkpoint.is_file() else []
        raise Interrupted(
            f"Stopped in '{title}'. Kept in {work.run.path}: {', '.join(kept) or 'nothing yet'}. "
            "Run the same command again to go on from there."
        ) from None
    finally:
        work.progress.finish()
    for one, (write, known) in zip(together, made, strict=True):
        if not (work.run.path / one.folder).is_dir():  # as that of a network that was trained once more
            _commit(work, one, write, {"seconds": round(time.monotonic() - began, 1), **known})
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return together


def _of_one_fit(work: Work, stage: Stage) -> list[Stage]:
    """The stages that take the same steps as this one, each before those that learn from it; mostly it alone.

    Who trains with another network learns from its way, which is gone when that one is finished: then it goes it once
    more. Otherwise one fit gives both, unless one of them waits for something else, or was begun alone.
    """
    if stage.kind != "fit":
        return [stage]
    fits = {other.network: other for other in work.stages if other.kind == "fit"}
    partner = {name: work.recipe.networks[name].fit.partner for name in fits}
    if (its := partner[stage.network]) is not None:
        return [fits[its], stage]
    if _checkpoint(work, stage).is_file():
        return [stage]
    for other in fits.values():
        ready = all(work.has(one) for one in work.stages if one.name in other.parents and one != stage)
        if partner[other.network] == stage.network and ready and not work.has(other):
            return [stage, other]
    return [stage]


def _checkpoint(work: Work, stage: Stage) -> Path:
    return work.run.path / f"{stage.folder}.checkpoint"


def _commit(work: Work, stage: Stage, write: Callable[[Path], dict[str, str]], known: dict[str, Any]) -> None:
    with store.new_folder(work.run.path / stage.folder) as folder:
        record = {
            "name": stage.name,
            "key": stage.key,
            "parents": list(stage.parents),
            **write(folder),
            **known,  # what was trained or synthesized knows its seconds better: others may have begun it, before a stop
            "device": str(work.train.images.device),
            "bf16": multiplies_bf16(work.train.images.device),  # in which a network trains here that is not quantized
            "versions": work.run.versions,
        }
        store.write_json(folder / "stage.json", record)


def _trained(work: Work, stages: list[Stage], title: str, checkpoint: Path, scratch: Path) -> list[Made]:
    """A network, a group or a head, trained; of several stages, in the same steps."""

    def watch(seen: Seen) -> None:
        reached = "" if seen.validation_accuracy is None else f" val {seen.validation_accuracy:.2f}%"
        detail = f"epoch {seen.epoch}/{seen.epochs} loss {seen.loss:.4f} {seen.images_per_s:,.0f} img/s{reached}"
        work.progress.update(title, seen.step, seen.steps, detail)

    lessons = work.recipe.networks[stages[-1].network].learns
    shown = {
        name: Training({one.target for one in lessons if one.what == "features" and name in one.networks})
        for name in (stage.network for stage in stages[:-1])
    }
    learners, records = zip(*(learner(work, stage, scratch, shown) for stage in stages), strict=True)
    histories = fit(
        learners,
        work.seen_by(stages[0].network),
        work.validation,
        checkpoint=checkpoint,
        checkpoint_every_s=work.checkpoint_every_s,
        watch=watch,
        stop=work.stop,
    )
    trained = {stage.network: one.network for stage, one in zip(stages, learners, strict=True)}
    made = []
    for stage, known, history in zip(stages, records, histories, strict=True):
        seconds = round(sum(epoch["seconds"] for epoch in history), 1)
        known |= {**losses_of_members(work, stage, trained), "history": history, "seconds": seconds}
        made.append(_network_made(trained[stage.network], known))
    return made


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
