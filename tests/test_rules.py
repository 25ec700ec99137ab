"""What has to fit together between the parts of a recipe."""

from __future__ import annotations

import pytest
from bad_recipes import HEAD, TCN4, network, problem, problems

from kdedge.recipe_reader import parse_recipe

PEERS = "learns[0].from: 'peers' are the other members of an ensemble; write split: none, and count: 2 or more"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{model: tcn-student-4, count: 3, learns: [{from: t, loss: mse}], head: {from: t}}",
         "count: 3 does not divide 256, the dense width of 't'; use 1, 2, 4, 8, 16, 32, 64 members"),
        ("{model: [mlp-64, mlp-64, mlp-64], learns: [{from: t, loss: mse}], head: {from: t}}",
         "model: 3 does not divide 256, the dense width of 't'; use 1, 2, 4, 8, 16, 32, 64 members"),
        ("{model: tcn-student-4, count: 2, head: {from: t}}",
         "model: tcn-student-4 has a dense vector of 64, 't' has 256, which is 128 for each of 2; "
         "use tcn-student-2, mlp-128; or write count: 4"),
        ("{model: [tcn-student-2, tcn-student-4], head: {from: t}}",
         "model[1]: tcn-student-4 has a dense vector of 64, 't' has 256, which is 128 for each of 2; "
         "use tcn-student-2, mlp-128"),
        ("{model: mlp-100, learns: [{from: t, loss: mse}], head: {from: t}}",
         "model: mlp-100 has a dense vector of 100, 't' has 256; "
         "use tcn-teacher, tcn-student-1, tcn-student-1x, kd-student, mlp-256"),
        ("{model: tcn-student-4, count: 4, split: none, head: {from: t}}",
         "model: tcn-student-4 has a dense vector of 64, 't' has 256; "
         "use tcn-teacher, tcn-student-1, tcn-student-1x, kd-student, mlp-256"),
        ("{model: [tcn-student-2, tcn-student-4]}",
         "model: the members' dense vectors are 128, 64 wide; a group's members need one width"),
    ],
)  # fmt: skip
def test_dense_vectors_are_learned_in_equal_chunks(line: str, message: str) -> None:
    assert network(line) == f"bad.yaml:5: networks.x.{message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{from: [t, u], loss: kd}", "from[1]: unknown network 'u'. Networks: t"),
        ("{from: [t, t], loss: kd}", "from[1]: 't' is in the list twice"),
        ("{from: [t, x], loss: kd}", "from[1]: 'x' cannot learn from itself"),
        (
            "{from: [labels, t], loss: kd}",
            "from[0]: kd learns from a network; from labels learn with loss: cross_entropy",
        ),
        (
            "{from: [t], drop: 1, loss: kd}",
            "drop: each batch leaves out 1 of 1 networks; write `from` as a list of 2 or more, or remove it",
        ),
        (
            "{from: t, drop: 1, loss: kd}",
            "drop: each batch leaves out some of several networks; write `from` as a list of 2 or more, or remove it",
        ),
        ("{from: [t], drop: 0, loss: kd}", "drop: expected a whole number from 1 to 63, got 0"),
        ("{from: [], loss: kd}", "from: empty; at least one entry is needed"),
        ("{from: [t, 3], loss: kd}", "from[1]: expected text, got 3"),
        ("{from: 3, loss: kd}", "from: expected text, got 3"),
        ("{from: [t, t], loss: cross_entropy}", "from: cross_entropy learns from labels, not from a list"),
    ],
)
def test_a_list_of_networks_to_learn_from(line: str, message: str) -> None:
    assert network(f"{{model: kd-student, learns: [{line}]}}").startswith(f"bad.yaml:5: networks.x.learns[0].{message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{model: mlp-9, split: none}", "split: expected a group; write count: 2 or more, or a list of models"),
        ("{model: mlp-9, count: 2, split: some}", "split: unknown split 'some'. Splits: chunks, none"),
        (
            "{model: mlp-9, count: 2, split: none, improve: {worst: 1, with: mlp-9}}",
            "improve: improves members that learn a chunk each; remove it, or `split: none`",
        ),
        ("{model: mlp-9, learns: [{from: peers, loss: kd}]}", PEERS),
        ("{model: mlp-9, count: 2, learns: [{from: peers, loss: kd}]}", PEERS),
        ("{model: mlp-9, count: 1, split: none, learns: [{from: peers, loss: kd}]}", PEERS),
        (
            "{model: mlp-9, count: 2, split: none, learns: [{from: [t, peers], loss: kd}]}",
            "learns[0].from[1]: 'peers' stand in no list; give them a lesson of their own",
        ),
        (
            "{model: [mlp-9, mlp-8], split: none, learns: [{loss: cross_entropy}, {from: peers, loss: mse}]}",
            "learns[1].from: mse compares dense vectors of one width; the members' are 9, 8 wide",
        ),
        (
            "{model: mlp-256, count: 2, split: none, learns: [{from: t, loss: adversarial}], head: {from: t}}",
            "learns[0].from: adversarial learns with one network or group, not with an ensemble; remove split: none",
        ),
        (
            "{model: mlp-9, count: 2, split: none, head: {from: peers}}",
            "head.from: unknown network 'peers'. Networks: t",
        ),
    ],
)
def test_only_members_of_an_ensemble_have_peers(line: str, message: str) -> None:
    assert network(line) == f"bad.yaml:5: networks.x.{message}"


@pytest.mark.parametrize(
    ("lessons", "enough"),
    [
        ("{from: peers, loss: kd, alpha: 1}", False),
        ("{from: peers, loss: dist}, {from: peers, loss: mse}", False),
        ("{from: peers, loss: kd}", True),  # which is of the labels, too
        ("{from: peers, loss: kd, alpha: 1}, {from: labels, loss: cross_entropy}", True),
        ("{from: peers, loss: kd, alpha: 1}, {from: t, loss: kd, alpha: 1}", True),
    ],
)
def test_peers_alone_know_nothing_of_the_images(lessons: str, enough: bool) -> None:
    line = f"{{model: mlp-9, count: 2, split: none, learns: [{lessons}]}}"
    if enough:
        assert parse_recipe(f"{HEAD}  x: {line}").networks["x"].is_group
    else:
        assert network(line) == (
            "bad.yaml:5: networks.x.learns: members that learn from one another alone learn nothing of the images; "
            "add a lesson from labels, such as {from: labels, loss: cross_entropy}, or from a network"
        )


def test_members_of_an_ensemble_may_differ() -> None:
    found = parse_recipe(HEAD + "  x: {model: [mlp-9, mlp-8], split: none, learns: [{from: peers, loss: kd}]}").networks
    assert (found["x"].widths, found["x"].sources) == ((9, 8), ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{members: [t, e], merge: mean, model: mlp-9}",
         "model: a network has a model, or is made of `members`; remove one of them"),
        ("{members: [t, e], merge: mean, fit: {epochs: 3}}",
         "fit: remove it: a network that is made of `members` is not trained"),
        ("{members: [t, e]}",
         "merge: missing; write `merge: mean`, the mean of their logits, or `merge: sum`, of their dense vectors, "
         "through the first one's head"),
        ("{members: [t, e], merge: max}", "merge: unknown merge 'max'. Merges: mean, sum"),
        ("{model: mlp-9, merge: sum}",
         "merge: says how `members` are merged; write members: [NETWORK, NETWORK], or remove it"),
        ("{members: [], merge: mean}", "members: empty; write for example `members: [first, second]`"),
        ("{members: [t, 3], merge: mean}", "members[1]: expected text, got 3"),
        ("{members: [t, u], merge: mean}", "members[1]: unknown network 'u'. Networks: t, e"),
        ("{members: [t, x], merge: mean}", "members[1]: 'x' cannot be a member of itself"),
        ("{members: [t, e, t], merge: mean}", "members[2]: 't' is in the list twice"),
        ("{members: [t], merge: mean}", "members: 't' alone is a network already; name two or more"),
        ("{members: [t, t.0], merge: mean}",
         "members[1]: only of an ensemble (split: none) can one member be named; write 't'"),
        ("{members: [e.0, e.2], merge: mean}", "members[1]: 'e' has the members e.0 to e.1"),
        ("{members: [t, e], merge: sum}",
         "members[1]: 'e' has a dense vector of 17, 't' one of 256; a sum needs one width"),
        ("{members: [e.0, e.1], merge: sum}",
         "members[1]: 'e.1' has a dense vector of 8, 'e.0' one of 9; a sum needs one width"),
        ("{}", "model: missing; write for example `model: tcn-student-4`"),
    ],
)  # fmt: skip
def test_what_is_merged_fits_together_and_is_not_trained(line: str, message: str) -> None:
    ensemble = "  e: {model: [mlp-9, mlp-8], split: none}"
    assert problem(f"{HEAD}{ensemble}\n  x: {line}\n") == f"bad.yaml:6: networks.x.{message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{model: mlp-9, quantize: {weights: 7}}", "quantize.weights: expected 8 or 4 or 2, got 7"),
        ("{model: mlp-9, quantize: {weights: 4}}",
         "quantize.weights: mlp-9 has a first layer and a head, which keep 8 bits, and nothing between them; write 8"),
        ("{model: mlp-64, count: 4, learns: [{from: t, loss: mse}], head: {from: t, fine_tune_epochs: 1}, quantize: {weights: 2}}",
         "quantize.weights: mlp-64 has a first layer and a head, which keep 8 bits, and nothing between them; write 8"),
        ("{model: mlp-9, quantize: {activations: 16}}", "quantize.activations: expected 8, got 16"),
        ("{model: mlp-9, quantize: {observe_steps: 0}}",
         "quantize.observe_steps: expected a whole number from 1 to 10,000,000, got 0"),
        ("{model: mlp-9, quantize: {weight: 8}}",
         "quantize.weight: unknown key 'weight'; did you mean 'weights'? "
         "Keys: weights, activations, observe_steps, from"),
        ("{model: mlp-9, quantize: {from: u}}", "quantize.from: unknown network 'u'. Networks: t, q, e"),
        ("{model: mlp-9, quantize: {from: x}}", "quantize.from: 'x' cannot learn from itself"),
        ("{model: mlp-9, quantize: {from: q}}",
         "quantize.from: 'q' is quantized, an ensemble, or made of members; name a plain network or group"),
        ("{model: mlp-9, quantize: {from: e}}",
         "quantize.from: 'e' is quantized, an ensemble, or made of members; name a plain network or group"),
        ("{model: mlp-9, quantize: {from: t}}",
         "quantize.from: 't' has model: 'tcn-teacher', 'x' has 'mlp-9'; its weights fit where model, count, view.resize, "
         "view.centre are the same"),
        ("{model: tcn-teacher, view: {centre: 20}, quantize: {from: t}}",
         "quantize.from: 't' has view.centre: nothing, 'x' has 20; its weights fit where model, count, view.resize, "
         "view.centre are the same"),
        ("{model: mlp-9, count: 2, split: none, quantize: {}}",
         "quantize: rounds a network or a group, not an ensemble; remove it, or `split: none`"),
        ("{model: mlp-256, learns: [{from: t, loss: mse}], head: {from: t}, quantize: {}}",
         "quantize: nothing teaches its head, which learns the range of what it rounds from that; "
         "write head.fine_tune_epochs: 1 or more, or add a lesson on logits"),
        ("{members: [t, q], merge: mean}",
         "members[1]: 'q' is quantized, and what is made of members is not; name one without `quantize`"),
        ("{members: [t, e.0], merge: mean, quantize: {}}",
         "quantize: remove it: a network that is made of `members` is not trained"),
    ],
)  # fmt: skip
def test_what_trains_quantized_can(line: str, message: str) -> None:
    others = "  q: {model: mlp-9, quantize: {}}\n  e: {model: [mlp-9, mlp-8], split: none}"
    assert problem(f"{HEAD}{others}\n  x: {line}\n") == f"bad.yaml:7: networks.x.{message}"


def test_a_group_that_trains_quantized_needs_a_lesson_on_logits_or_a_tuned_head() -> None:
    for rest in (
        "learns: [{from: t, loss: kd}]",
        "learns: [{from: t, loss: mse}], head: {from: t, fine_tune_epochs: 1}",
    ):
        recipe = parse_recipe(f"{HEAD}  x: {{model: tcn-student-4, count: 4, quantize: {{}}, {rest}}}\n")
        quantize = recipe.networks["x"].quantize
        assert quantize is not None and (quantize.weights, quantize.activations, quantize.source) == (8, 8, None)


def test_who_learns_from_merged_networks_learns_all_their_dense_vectors() -> None:
    merged = "  a: {members: [t, b], merge: mean}\n  b: {members: [t, c], merge: sum}\n  c: {model: kd-student}\n"
    assert problem(f"{HEAD}{merged}  x: {{model: mlp-9, head: {{from: a}}}}\n") == (
        "bad.yaml:8: networks.x.model: mlp-9 has a dense vector of 9, 'a' has 768; use mlp-768"
    )


def test_members_do_not_learn_from_what_is_made_of_them() -> None:
    text = f"{HEAD}  a: {{members: [t, b], merge: mean}}\n  b: {{model: mlp-9, learns: [{{from: a, loss: kd}}]}}\n"
    assert problem(text) == "bad.yaml:5: networks.a.members[1]: networks learn from each other in a cycle: a -> b -> a"


@pytest.mark.parametrize(
    ("minus", "message"),
    [
        ("s", ""),
        ("u", "learns[0].minus: unknown network 'u'. Networks: t, s, n"),
        ("x", "learns[0].minus: 'x' cannot learn from itself"),
        ("labels", "learns[0].minus: unknown network 'labels'. Networks: t, s, n"),
        ("t", "learns[0].minus: nothing of 't' is left over without 't'; name another network"),
        ("n", "model: kd-student has a dense vector of 256, 'n' has 9; use mlp-9"),
    ],
)
def test_what_another_network_leaves_over_has_the_width_of_both(minus: str, message: str) -> None:
    """And nothing has to teach the logits of a network that only completes another."""
    networks = "  s: {model: kd-student}\n  n: {model: mlp-9}\n"
    text = f"{HEAD}{networks}  x: {{model: kd-student, learns: [{{from: t, minus: {minus}, loss: mse}}]}}\n"
    if message:
        assert problem(text) == f"bad.yaml:7: networks.x.{message}"
    else:
        assert parse_recipe(text).networks["x"].sources == ("t", "s")


def test_the_rest_of_what_peers_give_is_not_learned() -> None:
    lessons = "learns: [{from: labels, loss: cross_entropy}, {from: peers, minus: s, loss: mse}]"
    text = f"{HEAD}  s: {{model: kd-student}}\n  x: {{model: kd-student, count: 2, split: none, {lessons}}}\n"
    assert problem(text) == (
        "bad.yaml:6: networks.x.learns[1].minus: what is left over is learned from a network, not from peers; remove `minus`"
    )


def test_members_of_a_group_that_learns_the_rest_are_not_improved() -> None:
    lessons = "learns: [{from: t, minus: s, loss: mse}]"
    improved = f"{{model: mlp-128, count: 2, improve: {{worst: 1, with: mlp-128}}, {lessons}}}"
    assert problem(f"{HEAD}  s: {{model: kd-student}}\n  x: {improved}\n", "networks.x.head={from: t}") == (
        "bad.yaml:6: networks.x.improve: measures members by what they learn of a network, not of what another one leaves "
        "over; remove it"
    )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[Shirt, Coat, 9]", ""),
        ("[Shirt, Cote]", "classes[1]: unknown class 'Cote'. Classes: T-shirt"),
        ("[1, 10]", "classes[1]: expected a class from 0 to 9, got 10"),
        ("[Coat, 3, 4]", "classes[2]: 4 is in the list twice"),
        ("[Coat, true]", "classes[1]: expected the name or the number of a class, got true"),
        ("[Coat]", "classes: among one class there is nothing to compare; name two or more"),
        ("[]", "classes: empty; write for example `classes: [Shirt, Coat]`"),
        ("Coat", "classes: expected a value such as [Shirt, Coat], got 'Coat'"),
    ],
)
def test_a_lesson_compares_classes_of_the_dataset(classes: str, message: str) -> None:
    text = f"{HEAD}  x: {{model: mlp-9, learns: [{{from: t, loss: kd, classes: {classes}}}]}}\n"
    if message:
        assert problem(text).startswith(f"bad.yaml:5: networks.x.learns[0].{message}")
    else:
        parse_recipe(text)


def test_logits_need_a_teacher() -> None:
    assert network("{model: kd-student, learns: [{from: t, loss: mse}]}") == (
        "bad.yaml:5: networks.x: nothing teaches its logits; write head: {from: t}, or add a lesson: cross_entropy, dist, dkd, kd"
    )


def test_every_cycle_is_printed() -> None:
    text = (
        "name: a\ndata: {name: mnist}\nnetworks:\n"
        "  d: {model: kd-student}\n"
        "  a: {model: kd-student, learns: [{from: d, loss: kd}, {from: b, loss: kd}]}\n"
        "  b: {model: kd-student, learns: [{from: c, loss: kd}]}\n"
        "  c: {model: kd-student, head: {from: a}}\n"
        "  e: {model: kd-student, head: {from: f}}\n"
        "  f: {model: kd-student, learns: [{from: e, loss: kd}, {from: f, loss: kd}]}\n"
    )
    assert problems(text) == [
        "bad.yaml:5: networks.a.learns[1].from: networks learn from each other in a cycle: a -> b -> c -> a",
        "bad.yaml:8: networks.e.head.from: networks learn from each other in a cycle: e -> f -> e",
        "bad.yaml:9: networks.f.learns[1].from: 'f' cannot learn from itself",
    ]


def test_models_see_the_images_of_the_dataset() -> None:
    assert problems(TCN4.replace("fashion-mnist", "cifar10")) == [
        f"bad.yaml:{line}: networks.{name}.model: {model} sees 1 x 28 x 28 images, cifar10 has 3 x 32 x 32; "
        "models for it: lenet5, vgg13-bn, vgg16-bn, vgg-student-1, vgg-student-2, vgg-student-4, vgg-student-8, resnet50, "
        "resnet-A-B-C-D, resnet-A-B-C-D-sN"
        for line, name, model in [(5, "teacher", "tcn-teacher"), (8, "students", "tcn-student-4")]
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{name: mnist, validation: 50000, calibration: 9999}", ""),
        ("{name: mnist, limit: 100000}", ""),
        ("{name: mnist, validation: 50000, calibration: 10000}",
         "validation (50,000) and calibration (10,000) leave nothing to train on of 60,000 images; keep fewer"),
        ("{name: cifar10, calibration: 45000}",
         "validation (5,000) and calibration (45,000) leave nothing to train on of 50,000 images; keep fewer"),
        ("{name: mnist, validation: 60000, limit: 10}",
         "validation (60,000) and calibration (512) leave nothing to train on of 60,000 images; keep fewer"),
    ],
)  # fmt: skip
def test_of_the_published_images_some_are_left_to_train_on(data: str, message: str) -> None:
    model = "lenet5" if "cifar" in data else "mlp-9"
    text = f"name: a\ndata: {data}\nnetworks: {{t: {{model: {model}}}}}\n"
    if message:
        assert problem(text) == f"bad.yaml:2: data: {message}"
    else:
        parse_recipe(text)


def test_images_of_one_channel_can_be_shown_to_networks_of_cifar10() -> None:
    text = "name: a\ndata: {name: mnist, as: rgb32}\nnetworks:\n  t: {model: lenet5}\n"
    assert parse_recipe(text).networks["t"].models == ("lenet5",)
    assert problems(text, "data.as=rgb") == ["bad.yaml: --set data.as=rgb: expected 'rgb32', got 'rgb'"]
    assert problems(text, "data.name=cifar10") == [
        "bad.yaml:2: data.as: rgb32 is for images of 1 x 28 x 28, cifar10 has 3 x 32 x 32; remove it"
    ]
    (wide,) = problems(text.replace("lenet5", "mlp-3"))
    assert wide.startswith(
        "bad.yaml:4: networks.t.model: mlp-3 sees 1 x 28 x 28 images, mnist as rgb32 has 3 x 32 x 32; "
    )
    assert wide.endswith("vgg-student-8, resnet50, resnet-A-B-C-D, resnet-A-B-C-D-sN")
    (narrow,) = problems(text.replace(", as: rgb32", ""))
    assert narrow.startswith(
        "bad.yaml:4: networks.t.model: lenet5 sees 3 x 32 x 32 images, mnist has 1 x 28 x 28; models"
    )
    assert narrow.endswith(", mlp-H; or write as: rgb32 in `data`")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[Ankle boots]", "[0]: unknown class 'Ankle boots'; did you mean 'Ankle boot'? Classes: T-shirt/top, Trouser"),
        ("[Coat, 10]", "[1]: expected a class from 0 to 9, got 10"),
        ("[4, Coat]", "[1]: 'Coat' is in the list twice"),
        ("[3.5]", "[0]: expected the name or the number of a class, got 3.5"),
        ("[true]", "[0]: expected the name or the number of a class, got true"),
        ("[]", ": empty; write for example `classes: [Shirt, Coat]`"),
        ("Coat", ": expected a value such as [Shirt, Coat], got 'Coat'"),
    ],
)
def test_a_view_has_classes_of_the_dataset(classes: str, message: str) -> None:
    found = network(f"{{model: kd-student, view: {{classes: {classes}}}}}")
    assert found.startswith(f"bad.yaml:5: networks.x.view.classes{message}")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("{resize: 5}", "resize: 28 pixels are not 5 blocks of two or more; use 14, 7, 4, 2, 1"),
        ("{resize: 28}", "resize: 28 pixels are not 28 blocks of two or more; use 14, 7, 4, 2, 1"),
        ("{resize: 0}", "resize: expected a whole number of at least 1, got 0"),
        ("{centre: 28}", "centre: of images of 28 x 28 expected 1 to 27 pixels, got 28"),
        ("{center: 14}", "center: unknown key 'center'; did you mean 'centre'? Keys: fraction, per_class, classes, resize, centre"),
    ],
)  # fmt: skip
def test_a_view_leaves_pixels_that_the_images_have(view: str, message: str) -> None:
    assert network(f"{{model: kd-student, view: {view}}}") == f"bad.yaml:5: networks.x.view.{message}"


@pytest.mark.parametrize("loss", ["sp", "rkd", "pkt", "crd"])
def test_relations_compare_dense_vectors_of_any_width(loss: str) -> None:
    lessons = f"[{{from: labels, loss: cross_entropy}}, {{from: t, loss: {loss}}}]"
    narrow = f"  x: {{model: tcn-student-4, learns: {lessons}}}"
    assert parse_recipe(HEAD + narrow).networks["x"].widths == (64,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{model: tcn-teacher, improve: {worst: 1, with: tcn-teacher}}",
         "improve: improves members of a group of one model; write `model` and `count`, or remove it"),
        ("{model: [tcn-student-4, tcn-student-4, tcn-student-4, mlp-64], learns: [{from: t, loss: mse}], head: {from: t}, "
         "improve: {worst: 1, with: tcn-student-4x}}",
         "improve: improves members of a group of one model; write `model` and `count`, or remove it"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, "
         "improve: {worst: 5, with: tcn-student-4x}}",
         "improve.worst: 5 of 4 members; write at most 4"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, "
         "improve: {worst: 1, with: tcn-student-2}}",
         "improve.with: tcn-student-2 sees 1 x 28 x 28 images and has a dense vector of 128, tcn-student-4 sees 1 x 28 x 28 "
         "images and has a dense vector of 64; use tcn-student-4, tcn-student-4x, mlp-64"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, "
         "improve: {worst: 1, with: vgg-student-8}}",
         "improve.with: vgg-student-8 sees 3 x 32 x 32 images and has a dense vector of 64, tcn-student-4 sees 1 x 28 x 28 "
         "images and has a dense vector of 64; use tcn-student-4, tcn-student-4x, mlp-64"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}, {from: t, loss: kd}], "
         "improve: {worst: 1, with: tcn-student-4x}}",
         "improve: kd is learned by the members together; improve needs lessons of each member's own chunk: mse"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: adversarial}], head: {from: t}, improve: {worst: 1, with: mlp-64}}",
         "improve: adversarial ends with its discriminators; improve needs lessons of each member's own chunk: mse"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, improve: {worst: 0, with: mlp-64}}",
         "improve.worst: expected a whole number from 1 to 64, got 0"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, improve: {worst: 1}}",
         "improve.with: missing; write for example `with: tcn-student-4x`"),
        ("{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], head: {from: t}, improve: {worst: 1, with: mlp}}",
         "improve.with: unknown model 'mlp'"),
    ],
)  # fmt: skip
def test_what_cannot_be_improved(line: str, message: str) -> None:
    assert network(line).startswith(f"bad.yaml:5: networks.x.{message}")


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        ("from: t, loss: fitnet, layer: conv3, from_layer: conv2",
         ".layer: tcn-student-4 has no layer 'conv3'; its layers: conv1, conv2"),
        ("from: t, loss: vid, layer: conv2, from_layer: dense",
         ".from_layer: tcn-teacher has no layer 'dense'; its layers: conv1, conv2"),
        ("from: m, loss: attention, layer: conv2, from_layer: conv2",
         ".from_layer: mlp-9 has no layer 'conv2'; none of its layers has maps"),
        ("from: [t, m], loss: attention, layer: conv2, from_layer: conv2",
         ".from_layer: mlp-9 has no layer 'conv2'; none of its layers has maps"),
        ("from: t, loss: attention, layer: conv1, from_layer: conv2",
         ".from_layer: 'conv2' of 't' has 12 x 12 maps, 'conv1' of 'x' 26 x 26; use conv1"),
        ("from: g, loss: fitnet, layer: conv2, from_layer: conv2",
         ": fitnet compares layers of networks of one model; 'g' is made of several"),
        ("from: both, loss: vid, layer: conv2, from_layer: conv2",
         ": vid compares layers of networks of one model; 'both' is made of several"),
        ("from: t, loss: fitnet, layer: conv2", ".from_layer: missing; write for example `from_layer: conv2`"),
        ("from: t, loss: fitnet, layer: 2, from_layer: conv2", ".layer: expected a value such as conv2, got 2"),
        ("from: t, what: dense, loss: vid, layer: conv2, from_layer: conv2", ".what: expected 'features', got 'dense'"),
    ],
)  # fmt: skip
def test_lessons_compare_layers_that_are_there_and_have_maps_of_one_size(lesson: str, message: str) -> None:
    networks = "  g: {model: tcn-student-4, count: 4, head: {from: t}}\n  m: {model: mlp-9}\n"
    networks += "  both: {members: [t, m], merge: mean}\n"
    student = f"  x: {{model: tcn-student-4, learns: [{{loss: cross_entropy}}, {{{lesson}}}]}}\n"
    assert problems(HEAD + networks + student) == [f"bad.yaml:8: networks.x.learns[1]{message}"]


def test_groups_do_not_learn_layers() -> None:
    lesson = "{from: t, loss: attention, layer: conv2, from_layer: conv2}"
    assert network(f"{{model: tcn-student-4, count: 4, learns: [{lesson}], head: {{from: t}}}}") == (
        "bad.yaml:5: networks.x.learns[0]: attention compares layers of networks of one model; 'x' is made of several"
    )


def test_a_group_of_one_learns_layers_and_channels_may_differ() -> None:
    lesson = "{from: t, loss: fitnet, layer: conv2, from_layer: conv2}"
    students = f"  x: {{model: tcn-student-1, count: 1, learns: [{lesson}], head: {{from: t}}}}"
    assert parse_recipe(HEAD + students).networks["x"].is_group


HINT = "learn from a network alone, such as {from: t, loss: kd, alpha: 1}"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: u}",
         "impressions.from: unknown network 'u'. Networks: t"),
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: x}",
         "impressions.from: 'x' cannot learn from itself"),
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {count: 10}",
         "impressions.from: missing; write for example `from: teacher`"),
        ("impressions: {from: t}",
         f"impressions: these images have no labels, which learns[0] (cross_entropy) would need; {HINT}"),
        ("learns: [{from: t, loss: kd}], impressions: {from: t}",
         f"impressions: these images have no labels, which learns[0] (kd) would need; {HINT}"),
        ("learns: [{from: t, loss: dist}, {from: t, loss: dkd}], impressions: {from: t}",
         f"impressions: these images have no labels, which learns[1] (dkd) would need; {HINT}"),
        ("learns: [{from: t, loss: kd, alpha: 1, trust: error}], impressions: {from: t}",
         f"impressions: these images have no labels, which learns[0] (kd) would need; {HINT}"),
        ("learns: [{from: t, loss: kd, alpha: 1}], head: {from: t, fine_tune_epochs: 1}, view: {per_class: 3}, impressions: {from: t}",
         f"impressions: these images have no labels, which head.fine_tune_epochs, view.per_class would need; {HINT}"),
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: t, betas: []}",
         "impressions.betas: empty; write for example `betas: [1.0, 0.1]`"),
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: t, betas: [1, 0.01]}",
         "impressions.betas[1]: expected a number of at least 0.05, got 0.01"),
        ("learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: t, step: 3}",
         "impressions.step: unknown key 'step'; did you mean 'steps'? Keys: from, count, steps, batch_size, lr, noise, temperature, betas"),
    ],
)  # fmt: skip
def test_impressions_come_from_a_network_and_have_no_labels(rest: str, message: str) -> None:
    assert network(f"{{model: kd-student, {rest}}}") == f"bad.yaml:5: networks.x.{message}"


def test_impressions_need_a_network_that_does_not_learn_from_them() -> None:
    text = (
        "name: a\ndata: {name: mnist}\nnetworks:\n"
        "  a: {model: kd-student, impressions: {from: b}, learns: [{from: b, loss: mse}], head: {from: b}}\n"
        "  b: {model: kd-student, learns: [{from: a, loss: kd}]}\n"
    )
    assert problems(text) == [
        "bad.yaml:4: networks.a.learns[0].from: networks learn from each other in a cycle: a -> b -> a"
    ]


KD_OF_T = "learns: [{from: t, loss: kd}]"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (f"{KD_OF_T}, fit: {{with: u}}", "fit.with: unknown network 'u'. Networks: t, later, pair, with_t, made, few"),
        (f"{KD_OF_T}, fit: {{with: x}}", "fit.with: 'x' cannot learn from itself"),
        (f"{KD_OF_T}, fit: {{with: [t]}}", "fit.with: expected a value such as teacher, got a list"),
        ("fit: {with: t}", "fit.with: nothing is learned from 't'; add a lesson from it, or remove `with`"),
        ("learns: [{from: pair, loss: kd}], fit: {with: pair}",
         "fit.with: 'pair' is made of members and does not train; remove `with`"),
        ("learns: [{from: with_t, loss: kd}], fit: {with: with_t}",
         "fit.with: 'with_t' trains with 't' itself; name a network that trains with no other"),
        ("learns: [{from: later, loss: kd}], fit: {with: later}",
         "fit.with: 'later' goes on after these steps (head.fine_tune_epochs), where nobody trains with it; "
         "remove one of both"),
        ("learns: [{from: made, loss: kd}], fit: {with: made}",
         "fit.with: 'made' has images of its own (impressions); who trains together sees the same images"),
        (f"{KD_OF_T}, fit: {{with: t}}, head: {{from: t}}",
         "head.from: 't' is not finished when 'x' begins to train with it (fit.with); name another network"),
        (f"{KD_OF_T}, fit: {{with: t}}, quantize: {{from: t}}",
         "quantize.from: 't' is not finished when 'x' begins to train with it (fit.with); name another network"),
        ("learns: [{from: t, loss: kd, alpha: 1}], fit: {with: t}, impressions: {from: t}",
         "impressions: images that are not those of 't', with which 'x' trains (fit.with); remove one of both"),
        (f"{KD_OF_T}, fit: {{with: t, epochs: 5}}",
         "fit.epochs: expected 10, as 't' has, with which 'x' trains (fit.with), got 5"),
        (f"{KD_OF_T}, fit: {{with: t, batch_size: 32}}",
         "fit.batch_size: expected 128, as 't' has, with which 'x' trains (fit.with), got 32"),
        (f"{KD_OF_T}, fit: {{with: t, optimizer: sgd}}",
         "fit.optimizer: expected 'adam', as 't' has, with which 'x' trains (fit.with), got 'sgd'"),
        (f"{KD_OF_T}, fit: {{with: t, augment: {{flip: true}}}}",
         "fit.augment.flip: expected false, as 't' has, with which 'x' trains (fit.with), got true"),
        (f"{KD_OF_T}, fit: {{with: t}}, view: {{fraction: 0.5}}",
         "view.fraction: expected nothing, as 't' has, with which 'x' trains (fit.with), got 0.5"),
        ("learns: [{from: few, loss: kd}], fit: {with: few}",
         "view.per_class: expected 9, as 'few' has, with which 'x' trains (fit.with), got nothing"),
        ("members: [t, few], merge: mean, fit: {with: t}",
         "fit: remove it: a network that is made of `members` is not trained"),
    ],
)  # fmt: skip
def test_who_trains_together_takes_the_same_steps(rest: str, message: str) -> None:
    others = (
        "  later: {model: tcn-teacher, head: {from: t, fine_tune_epochs: 1}}\n"
        "  pair: {members: [t, few], merge: mean}\n"
        f"  with_t: {{model: tcn-teacher, {KD_OF_T}, fit: {{with: t}}}}\n"
        "  made: {model: tcn-teacher, learns: [{from: t, loss: kd, alpha: 1}], impressions: {from: t}}\n"
        "  few: {model: tcn-teacher, view: {per_class: 9}}\n"
    )
    model = "" if rest.startswith("members") else "model: tcn-teacher, "
    assert problem(f"{HEAD}{others}  x: {{{model}{rest}}}\n") == f"bad.yaml:10: networks.x.{message}"


def test_defaults_are_the_same_steps_and_each_has_its_own_pace() -> None:
    fit = "{with: t, epochs: 10, batch_size: 128, optimizer: adam, augment: {flip: false}, lr: 0.1, warmup: 0.5}"
    recipe = parse_recipe(f"{HEAD}  x: {{model: kd-student, {KD_OF_T}, view: {{resize: 14}}, fit: {fit}}}\n")
    assert recipe.networks["x"].fit.partner == "t" and recipe.networks["t"].fit.partner is None


def test_members_that_are_improved_do_not_train_with_another_network() -> None:
    group = "{model: tcn-student-4, count: 4, learns: [{from: t, loss: mse}], improve: {worst: 1, with: tcn-student-4x}"
    head = "head: {from: u, fine_tune_epochs: 1}"
    text = f"{HEAD}  u: {{model: tcn-teacher}}\n  x: {group}, {head}, fit: {{with: t}}}}\n"
    assert problem(text) == (
        "bad.yaml:6: networks.x.improve: fresh members would train without 't', with which 'x' trains (fit.with); "
        "remove one of both"
    )
    text = f"{HEAD}  g: {group}, head: {{from: t}}}}\n  x: {{model: mlp-9, learns: [{{from: g, loss: kd}}], fit: {{with: g}}}}\n"
    assert problem(text) == (
        "bad.yaml:6: networks.x.fit.with: 'g' goes on after these steps (improve), where nobody trains with it; "
        "remove one of both"
    )


def test_who_trains_together_learns_in_one_direction() -> None:
    text = (
        "name: a\ndata: {name: mnist}\nnetworks:\n"
        "  a: {model: kd-student, learns: [{from: b, loss: kd}], fit: {with: b}}\n"
        "  b: {model: kd-student, learns: [{from: a, loss: kd}]}\n"
    )
    assert problems(text) == [
        "bad.yaml:4: networks.a.learns[0].from: networks learn from each other in a cycle: a -> b -> a"
    ]
