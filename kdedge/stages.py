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
from kdedge.models.network import Network, count_parameters, merged
from kdedge.plan import Stage
from kdedge.rules.merge import split_name
from kdedge.work import Work

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


def _trained(work: Work, stage: Stage, checkpoint: Path, scratch: Path) -> Made:
    """A network, a group or a head, trained."""

    def watch(seen: Seen) -> None:
        reached = "" if seen.validation_accuracy is None else f" val {seen.validation_accuracy:.2f}%"
        detail = f"epoch {seen.epoch}/{seen.epochs} loss {seen.loss:.4f} {seen.images_per_s:,.0f} img/s{reached}"
        work.progress.update(stage.name, seen.step, seen.steps, detail)

    one, known = learner(work, stage, scratch, {})
    (history,) = fit(
        [one],
        work.seen_by(stage.network),
        work.validation,
        checkpoint=checkpoint,
        checkpoint_every_s=work.checkpoint_every_s,
        watch=watch,
        stop=work.stop,
    )
    seconds = round(sum(epoch["seconds"] for epoch in history), 1)
    known |= {**losses_of_members(work, stage, {stage.network: one.network}), "history": history, "seconds": seconds}
    return _network_made(one.network, known)


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
