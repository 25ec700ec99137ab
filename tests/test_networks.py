"""Networks of a recipe: drawn by seed and name, or read from a finished stage, which must be as it was committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY
from tiny_export import recorded_data
from torch import nn

from kdedge.errors import RunError
from kdedge.models.network import Network
from kdedge.models.view import Centre, LowResolution
from kdedge.networks import finished_network, new_network, new_parts, with_new_members
from kdedge.quantize.fake import WeightQuantizer
from kdedge.recipe import Recipe
from kdedge.recipe_reader import parse_recipe
from kdedge.store import Run, StageRecord, save_tensors, sha256, write_json

STAGE = "fit teacher"


def weights(network: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in network.state_dict().items()}


def finished(recipe: Recipe, folder: Path) -> tuple[Run, Path]:
    """A run whose teacher is finished, and the stage's folder."""
    stages = [StageRecord(name=STAGE, network="teacher", key="k", folder="stages/fit-teacher-k")]
    run = Run(
        name="tiny",
        quick=False,
        recipe=recipe.resolved(),
        data=recorded_data(),
        stages=stages,
        versions={},
        path=folder,
    )
    stage = folder / "stages" / "fit-teacher-k"
    save_tensors(stage / "weights.safetensors", new_network(recipe, "teacher").state_dict())
    write_json(stage / "stage.json", {"weights_sha256": sha256(stage / "weights.safetensors")})
    return run, stage


def test_weights_depend_on_seed_and_name_and_nothing_else(tiny: Recipe) -> None:
    first = weights(new_network(tiny, "teacher"))
    torch.rand(3)
    new_network(tiny, "students")
    assert weights(new_network(tiny, "teacher")) == first
    other_seed = weights(new_network(parse_recipe(TINY, overrides=["seed=1"]), "teacher"))
    renamed = weights(new_network(parse_recipe(TINY.replace("teacher", "tutor")), "tutor"))
    assert not set(other_seed.values()) & set(first.values())
    assert not set(renamed.values()) & set(first.values())


def test_members_see_what_their_view_leaves_and_have_the_weights_that_they_would_have_without_one(tiny: Recipe) -> None:
    low = new_network(parse_recipe(TINY, overrides=["networks.students.view={resize: 14, centre: 20}"]), "students")
    whole = new_network(tiny, "students")
    assert list(weights(low).values()) == list(weights(whole).values())
    images = torch.rand(3, 1, 28, 28)
    seen = Centre(20)(LowResolution(14)(images))
    assert torch.equal(low.dense(images), whole.dense(seen))
    assert torch.equal(low.members[1](images), whole.members[1](seen))  # a member alone as well
    part = new_network(parse_recipe(TINY, overrides=["networks.students.view.fraction=0.5"]), "students")
    assert part.state_dict().keys() == whole.state_dict().keys()


def test_what_each_member_sees_stays_with_it() -> None:
    """In a network that is made of others, and where a new member takes the place of another."""
    views = ["networks.students.view.resize=14", "networks.both={members: [students, teacher], merge: mean}"]
    recipe = parse_recipe(TINY, overrides=[*views, "networks.students.improve={worst: 1, with: tcn-student-8}"])
    assert sees_less(new_network(recipe, "both")) == [True, True, False]
    assert sees_less(with_new_members(new_network(recipe, "students"), [1], recipe, "students")) == [True, True]


def sees_less(network: Network) -> list[bool]:
    return [any(isinstance(part, LowResolution) for part in member.modules()) for member in network.members]


def test_members_of_a_group_differ(tiny: Recipe) -> None:
    first, second = new_network(tiny, "students").members
    assert not torch.equal(first[1].weight, second[1].weight)  # type: ignore[index]


def test_convolutions_are_channels_last(tiny: Recipe) -> None:
    convolution = new_network(tiny, "teacher").members[0][2]  # type: ignore[index]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


ADVERSARIAL = "networks.students.learns=[{from: labels, loss: cross_entropy}, {from: teacher, loss: adversarial}]"


def test_parts_of_a_lesson_depend_on_seed_network_lesson_and_source_and_nothing_else() -> None:
    recipe = parse_recipe(TINY, overrides=[ADVERSARIAL])
    first = weights(new_parts(recipe, "students", 1, "teacher"))
    torch.rand(3)
    assert weights(new_parts(recipe, "students", 1, "teacher")) == first
    other_seed = weights(new_parts(parse_recipe(TINY, overrides=[ADVERSARIAL, "seed=1"]), "students", 1, "teacher"))
    assert {name for name in first if first[name] != other_seed[name]} == {name for name in first if "weight" in name}
    assert not weights(new_parts(recipe, "students", 0, "labels"))


def test_parts_have_the_shapes_of_the_layers_that_the_lesson_compares() -> None:
    hint = "{from: teacher, loss: fitnet, layer: conv2, from_layer: conv2}"
    recipe = parse_recipe(
        "name: a\ndata: {name: fashion-mnist}\nnetworks:\n  teacher: {model: tcn-teacher}\n"
        f"  student: {{model: tcn-student-8, learns: [{{loss: cross_entropy}}, {hint}]}}\n"
    )
    parts = new_parts(recipe, "student", 1, "teacher")
    assert {name: tuple(part.shape) for name, part in parts.items()} == {"weight": (64, 5), "bias": (64, 1)}


def test_parts_are_drawn_as_linear_layers_are() -> None:
    parts = new_parts(parse_recipe(TINY, overrides=[ADVERSARIAL]), "students", 1, "teacher")
    weight = parts["weight1"]
    assert weight.shape == (2, 128, 64)
    assert 0.124 < weight.max() <= 1 / 8 and -1 / 8 <= weight.min() < -0.124  # 64 inputs
    assert not parts["bias1"].any()


def test_a_finished_network_is_as_it_was_and_ready_to_use(tiny: Recipe, tmp_path: Path) -> None:
    run, _ = finished(tiny, tmp_path)
    network = finished_network(run, tiny, "teacher", STAGE)
    assert weights(network) == weights(new_network(tiny, "teacher"))
    assert not network.training


def test_weights_of_another_hash_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    run, stage = finished(tiny, tmp_path)
    file = stage / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"weights\.safetensors was changed: expected SHA-256 .*distil again"):
        finished_network(run, tiny, "teacher", STAGE)


def test_weights_without_a_hash_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    run, stage = finished(tiny, tmp_path)
    write_json(stage / "stage.json", {})
    with pytest.raises(RunError, match=r"weights\.safetensors was changed"):
        finished_network(run, tiny, "teacher", STAGE)


def test_weights_of_another_network_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    run, _ = finished(tiny, tmp_path)
    with pytest.raises(RunError, match=r"weights\.safetensors does not fit network 'students'"):
        finished_network(run, tiny, "students", STAGE)


def test_missing_weights_and_unfinished_stages_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    run, stage = finished(tiny, tmp_path)
    (stage / "weights.safetensors").unlink()
    with pytest.raises(RunError, match=r"weights\.safetensors is missing"):
        finished_network(run, tiny, "teacher", STAGE)
    (stage / "stage.json").unlink()
    with pytest.raises(RunError, match="stage 'fit teacher' is not finished"):
        finished_network(run, tiny, "teacher", STAGE)


GROUP = "networks.students={model: mlp-32, count: 2, learns: [{from: teacher, loss: mse}], head: {from: teacher}, "


def test_new_members_take_the_places_of_the_worst_and_alone_learn() -> None:
    recipe = parse_recipe(TINY, overrides=[f"{GROUP}improve: {{worst: 1, with: tcn-student-8}}}}"])
    group = new_network(recipe, "students")
    kept = {name: tensor.clone() for name, tensor in group.state_dict().items() if not name.startswith("members.1.")}
    improved = with_new_members(group, [1], recipe, "students")
    assert improved.models == ["mlp-32", "tcn-student-8"]
    assert {
        name: tensor for name, tensor in improved.state_dict().items() if not name.startswith("members.1.")
    }.keys() == kept.keys()
    assert all(torch.equal(improved.state_dict()[name], tensor) for name, tensor in kept.items())
    assert [any(weight.requires_grad for weight in member.parameters()) for member in improved.members] == [False, True]
    again = with_new_members(new_network(recipe, "students"), [1], recipe, "students")
    assert weights(again) == weights(improved)


def test_a_finished_group_has_the_models_that_its_stage_recorded(tmp_path: Path) -> None:
    recipe = parse_recipe(TINY, overrides=[f"{GROUP}improve: {{worst: 1, with: tcn-student-8}}}}"])
    run, stage = finished(recipe, tmp_path)
    improved = with_new_members(new_network(recipe, "students"), [0], recipe, "students")
    save_tensors(stage / "weights.safetensors", improved.state_dict())
    digest = sha256(stage / "weights.safetensors")
    write_json(stage / "stage.json", {"weights_sha256": digest, "models": improved.models})
    found = finished_network(run, recipe, "students", STAGE)
    assert weights(found) == weights(improved) and found.models == ["tcn-student-8", "mlp-32"]
    for damaged in (["mlp-32", "mlp-32"], ["tcn-student-8"], ["unheard-of", "mlp-32"], [None, 3], 3):
        write_json(stage / "stage.json", {"weights_sha256": digest, "models": damaged})
        with pytest.raises(RunError, match=r"weights\.safetensors does not fit network 'students'"):
            finished_network(run, recipe, "students", STAGE)


def test_new_members_of_a_group_that_trains_quantized_round_as_well() -> None:
    recipe = parse_recipe(
        TINY,
        overrides=["networks.students.quantize={}", "networks.students.improve={worst: 1, with: mlp-32}"],
    )
    improved = with_new_members(new_network(recipe, "students"), [1], recipe, "students")
    counts = [sum(isinstance(part, WeightQuantizer) for part in member.modules()) for member in improved.members]
    assert counts == [0, 1]  # `new_network` draws them plain
