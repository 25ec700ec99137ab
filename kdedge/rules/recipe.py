"""That all parts of a recipe fit together: names, images and dense vectors here, and by `check` what the other files see to.

The rules look at the plain values and skip what the schema has refused already, so that a wrong number in one place
hides nothing in another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from kdedge.data import catalog as datasets
from kdedge.losses import LOSSES, OF_CHUNKS, OF_MEMBERS
from kdedge.losses.lesson import NOT_NETWORKS
from kdedge.models import catalog
from kdedge.rules import data, layers, merge, quantize, together
from kdedge.wording import KeyPath, unknown

Finding = tuple[KeyPath, str]

MAX_MEMBERS = 64

_WHAT = {name: lesson.model_fields["what"].default for name, lesson in LOSSES.items()}


@dataclass
class _Network:
    """One network, as far as it is right in itself."""

    name: str
    models: list[tuple[KeyPath, str]] = field(default_factory=list)  # where and which, one a member; empty: not known
    is_group: bool = False
    is_ensemble: bool = False
    lessons: list[tuple[KeyPath, str, str]] = field(default_factory=list)  # where `from` is, loss ("": not known), from
    lessons_known: bool = True
    improve: tuple[int, str] | None = None  # how many members, with which model
    head: str | None = None  # the network it comes from
    head_known: bool = True
    impressions: str | None = None  # the network that they are made from
    start: str | None = None  # the network whose weights it starts with, to be quantized
    partner: str | None = None  # the network that it trains with
    minus: list[tuple[KeyPath, str]] = field(default_factory=list)  # networks whose dense vectors are subtracted
    drops: list[tuple[KeyPath, int]] = field(default_factory=list)  # how many of the networks of a lesson are dropped
    members: list[tuple[KeyPath, str]] = field(default_factory=list)  # the networks that a merged one is made of

    def sources(self) -> Iterator[tuple[KeyPath, str]]:
        """Where another network is named, and its name."""
        yield from ((at, source) for at, _, source in self.lessons if source not in NOT_NETWORKS)
        yield from self.minus
        yield from ((at, merge.split_name(member)[0]) for at, member in self.members)
        for part, source in (("head", self.head), ("impressions", self.impressions), ("quantize", self.start)):
            if source is not None:
                yield ("networks", self.name, part, "from"), source
        if self.partner is not None:
            yield ("networks", self.name, "fit", "with"), self.partner


def check(recipe: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[Finding]:
    """What does not fit together in a recipe of plain values; `refused` are the places already complained of."""
    yield from _seeds(recipe, refused)
    written = recipe.get("networks")
    if not isinstance(written, dict) or ("networks",) in refused:
        return
    networks = {name: _network(name, value, refused) for name, value in written.items() if isinstance(value, dict)}
    yield from _names(networks, list(written))
    yield from _cycles(networks)
    images = recipe.get("data")
    if isinstance(images, dict) and "name" in images and not {("data",), ("data", "name"), ("data", "as")} & {*refused}:
        yield from _images(networks, images["name"], images.get("as"))
        dataset = datasets.find(images["name"], images.get("as"))
        yield from data.check_sizes(images, dataset, refused)
        yield from data.check(written, dataset, refused)
    yield from layers.check(written, refused)
    yield from quantize.check(written, refused)
    yield from together.check(written, refused)
    yield from merge.check(written, refused, lambda name: _width(name, networks))
    for network in networks.values():
        yield from _peers(network)
        yield from _chunks(network, networks)
        yield from _improve(network)
        yield from _logits(network)
    yield from _references(recipe, list(written))


def _seeds(recipe: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[Finding]:
    seeds = recipe.get("seeds")
    if seeds and "seed" in recipe:
        yield ("seed",), "remove it, or remove `seeds`, which says the same for several runs"
    listed = seeds if isinstance(seeds, list | tuple) else ()
    for n, seed in enumerate(listed):
        if seed in listed[:n] and ("seeds", n) not in refused:
            yield ("seeds", n), f"{seed} is in the list twice"


def _references(recipe: dict[str, Any], networks: list[str]) -> Iterator[Finding]:
    """Printed accuracies belong to networks and variants that are there."""
    variants, references = recipe.get("variants", {}), recipe.get("reference")
    for n, known in enumerate(references if isinstance(references, list | tuple) else ()):
        at: KeyPath = ("reference", n)
        if not isinstance(known, dict):
            continue
        network, variant = known.get("network"), known.get("variant")
        if isinstance(network, str) and network not in networks:
            yield (*at, "network"), unknown("network", network, networks)
        if isinstance(variant, str) and isinstance(variants, dict) and variant not in variants:
            yield (*at, "variant"), unknown("variant", variant, variants)


def _network(name: str, value: dict[str, Any], refused: Collection[KeyPath]) -> _Network:
    at: KeyPath = ("networks", name)
    bad = {path[2:] for path in refused if path[:2] == at}
    bad_keys = {path[0] for path in bad if path}
    model, count = value.get("model"), value.get("count")
    network = _Network(name, is_group=count is not None or isinstance(model, list | tuple))
    network.is_ensemble = value.get("split") == "none"
    if not bad_keys & {"model", "count"}:
        if isinstance(model, str):
            network.models = [((*at, "model"), model)] * (count or 1)
        elif isinstance(model, list | tuple):
            network.models = [((*at, "model", n), member) for n, member in enumerate(model)]

    network.lessons_known = "learns" not in bad_keys
    lessons = value.get("learns", [{"loss": "cross_entropy"}])
    for n, lesson in enumerate(lessons if isinstance(lessons, list | tuple) else ()):
        if not isinstance(lesson, dict) or ("learns", n, "from") in bad:
            continue
        source = lesson.get("from", "labels")
        loss = lesson.get("loss") if ("learns", n, "loss") not in bad else ""
        place: KeyPath = (*at, "learns", n, "from")
        several = isinstance(source, list | tuple)
        found = [((*place, i), one) for i, one in enumerate(source)] if several else [(place, source)]
        network.lessons += [(where, loss or "", one) for where, one in found if isinstance(one, str)]
        if isinstance(minus := lesson.get("minus"), str) and ("learns", n, "minus") not in bad:
            network.minus.append(((*at, "learns", n, "minus"), minus))
        if isinstance(drop := lesson.get("drop"), int) and ("learns", n, "drop") not in bad:
            network.drops.append(((*at, "learns", n, "drop"), drop))

    members = value.get("members")
    if isinstance(members, list | tuple) and "members" not in bad_keys:
        network.members = [((*at, "members", n), member) for n, member in enumerate(members)]
        network.lessons, network.lessons_known = [], False
    if isinstance(improve := value.get("improve"), dict) and "improve" not in bad_keys:
        network.improve = (improve["worst"], improve["with"])
    network.head_known = "head" not in bad_keys
    if isinstance(head := value.get("head"), dict) and isinstance(head.get("from"), str):
        network.head = head["from"]
    if isinstance(made := value.get("impressions"), dict) and isinstance(made.get("from"), str):
        network.impressions = made["from"]
    if isinstance(quantized := value.get("quantize"), dict) and isinstance(quantized.get("from"), str):
        network.start = quantized["from"]
    if isinstance(fit := value.get("fit"), dict) and isinstance(fit.get("with"), str):
        network.partner = fit["with"]
    return network


def _names(networks: dict[str, _Network], names: list[str]) -> Iterator[Finding]:
    for network in networks.values():
        for at, source in network.sources():
            if source == network.name:
                yield at, f"{source!r} cannot {'be a member of' if at[2] == 'members' else 'learn from'} itself"
            elif source not in names:
                yield at, unknown("network", source, [name for name in names if name != network.name])
        for at, loss, source in network.lessons:
            if source == "labels" and loss not in ("", "cross_entropy"):
                yield at, f"{loss} learns from a network; from labels learn with loss: cross_entropy"
        for at, minus in network.minus:
            of = [source for where, _, source in network.lessons if where[:4] == at[:4]]
            if minus in of:
                yield at, f"nothing of {minus!r} is left over without {minus!r}; name another network"
            if "peers" in of:
                yield at, "what is left over is learned from a network, not from peers; remove `minus`"
        for at, drop in network.drops:
            count = sum(where[:5] == (*at[:4], "from") and len(where) > 5 for where, _, _ in network.lessons)
            if drop >= count:
                said = f"{drop} of {count} networks" if count else "some of several networks"
                yield at, f"each batch leaves out {said}; write `from` as a list of {drop + 1} or more, or remove it"
        several = [(at[:5], at, source) for at, _, source in network.lessons if len(at) > 5]
        for n, (lesson, at, source) in enumerate(several):
            if any((lesson, source) == (other, before) for other, _, before in several[:n]):
                yield at, f"{source!r} is in the list twice"


def _peers(network: _Network) -> Iterator[Finding]:
    """Only the members of an ensemble have peers: those of other groups know a chunk each, and none knows another's."""
    at: KeyPath = ("networks", network.name)
    if network.is_ensemble and not network.is_group:
        yield (*at, "split"), "expected a group; write count: 2 or more, or a list of models"
    for where, loss, source in network.lessons:
        if network.is_ensemble and loss in LOSSES and LOSSES[loss].has_parts:
            yield where, f"{loss} learns with one network or group, not with an ensemble; remove split: none"
        if source != "peers":
            continue
        if len(where) > 5:
            yield where, "'peers' stand in no list; give them a lesson of their own"
        elif not network.is_ensemble or len(network.models) == 1:
            yield where, "'peers' are the other members of an ensemble; write split: none, and count: 2 or more"
        elif loss in OF_CHUNKS and len({_info(model).dense for _, model in network.models}) > 1:
            widths = ", ".join(str(_info(model).dense) for _, model in network.models)
            yield where, f"{loss} compares dense vectors of one width; the members' are {widths} wide"


def _cycles(networks: dict[str, _Network]) -> Iterator[Finding]:
    edges: dict[str, dict[str, KeyPath]] = {name: {} for name in networks}
    for name, network in networks.items():
        for at, source in network.sources():
            if source in networks and source != name:
                edges[name].setdefault(source, at)
    while True:
        try:
            TopologicalSorter(edges).prepare()
            return
        except CycleError as error:
            cycle = error.args[1][:0:-1]  # each learns from the next, the last from the first
        first = cycle.index(min(cycle, key=list(edges).index))
        cycle = [*cycle[first:], *cycle[: first + 1]]
        yield edges[cycle[0]].pop(cycle[1]), f"networks learn from each other in a cycle: {' -> '.join(cycle)}"


def _images(networks: dict[str, _Network], dataset: str, as_: datasets.As | None) -> Iterator[Finding]:
    shape = datasets.find(dataset, as_).shape
    name = f"{dataset} as {as_}" if as_ else dataset
    fits = ", ".join(catalog.names(shape))
    for network in networks.values():
        for at, model in dict.fromkeys(network.models):
            if (sees := _info(model).image) != shape:
                other = "; or write as: rgb32 in `data`" if (shape, sees) == ((1, 28, 28), (3, 32, 32)) else ""
                yield at, f"{model} sees {_by(sees)} images, {name} has {_by(shape)}; models for it: {fits}{other}"


def _chunks(network: _Network, networks: dict[str, _Network]) -> Iterator[Finding]:
    """Members learn equal chunks of a dense vector (Malik et al. 2021, Eq. 3), those of an ensemble all of it; a head fits
    one width."""
    sources = [source for _, loss, source in network.lessons if loss in OF_CHUNKS]
    sources += [source for _, source in network.minus]
    sources += [network.head] if network.head is not None else []
    models = [model for _, model in network.models]
    widths = {_info(model).dense: None for model in models}
    if not sources and len(widths) > 1 and not network.is_ensemble:
        message = f"the members' dense vectors are {', '.join(map(str, widths))} wide; a group's members need one width"
        yield ("networks", network.name, "model"), message
    for source in dict.fromkeys(sources):
        width = _width(source, networks) if source != network.name else 0
        if width and models:
            yield from _chunk_problems(network, source, width)


def _width(name: str, networks: dict[str, _Network], above: tuple[str, ...] = ()) -> int:
    """Width of the dense vector of a network, or of one member of an ensemble (`students.0`); 0 where it is not known."""
    name, number = merge.split_name(name)
    network = networks.get(name)
    if network is None or name in above:
        return 0
    if network.members:
        widths = [_width(member, networks, (*above, name)) for _, member in network.members]
        return sum(widths) if all(widths) else 0
    widths = [_info(model).dense for _, model in network.models]
    return sum(widths) if number is None else sum(widths[number : number + 1])


def _chunk_problems(network: _Network, source: str, width: int) -> Iterator[Finding]:
    members = 1 if network.is_ensemble else len(network.models)
    if width % members:
        counts = [str(n) for n in range(1, MAX_MEMBERS + 1) if width % n == 0]
        where = "model" if len(network.models[0][0]) == 4 else "count"
        message = f"{members} does not divide {width}, the dense width of {source!r}; use {', '.join(counts)} members"
        yield ("networks", network.name, where), message
        return
    chunk = width // members
    for at, model in dict.fromkeys(network.models):
        info = _info(model)
        if info.dense == chunk:
            continue
        needs = f"{source!r} has {width}" + (f", which is {chunk} for each of {members}" if chunk < width else "")
        fits = _of_shape(chunk, info.image)
        advice = f"; use {', '.join(fits)}" if fits else ""
        divides = width % info.dense == 0 and width // info.dense <= MAX_MEMBERS
        if len(at) == 3 and divides and not network.is_ensemble:
            advice += f"; or write count: {width // info.dense}"
        yield at, f"{model} has a dense vector of {info.dense}, {needs}{advice}"


def _improve(network: _Network) -> Iterator[Finding]:
    """Members are improved one by one, so each must have learned alone, and the new one must fit in its place."""
    if network.improve is None or not network.models:
        return
    at: KeyPath = ("networks", network.name, "improve")
    worst, better = network.improve
    models = list(dict.fromkeys(model for _, model in network.models))
    if network.is_ensemble:
        yield at, "improves members that learn a chunk each; remove it, or `split: none`"
        return
    if not network.is_group or len(models) > 1:
        yield at, "improves members of a group of one model; write `model` and `count`, or remove it"
        return
    if worst > len(network.models):
        yield (*at, "worst"), f"{worst} of {len(network.models)} members; write at most {len(network.models)}"
    old, new = _info(models[0]), _info(better)
    if (old.dense, old.image) != (new.dense, new.image):
        described = [f"{_by(info.image)} images and has a dense vector of {info.dense}" for info in (new, old)]
        fits = ", ".join(_of_shape(old.dense, old.image))
        yield (*at, "with"), f"{better} sees {described[0]}, {models[0]} sees {described[1]}; use {fits}"
    if network.minus:
        yield at, "measures members by what they learn of a network, not of what another one leaves over; remove it"
    others = [loss for _, loss, _ in network.lessons if loss and loss not in OF_MEMBERS]
    if others:
        why = "ends with its discriminators" if others[0] in OF_CHUNKS else "is learned by the members together"
        yield at, f"{others[0]} {why}; improve needs lessons of each member's own chunk: {', '.join(OF_MEMBERS)}"


def _logits(network: _Network) -> Iterator[Finding]:
    if not network.lessons_known or not network.head_known or network.head is not None or network.minus:
        return
    if not any(_WHAT.get(loss) == "logits" for _, loss, _ in network.lessons):
        source = next((source for _, source in network.sources()), "NETWORK")
        lessons = ", ".join(loss for loss, what in _WHAT.items() if what == "logits")
        message = f"nothing teaches its logits; write head: {{from: {source}}}, or add a lesson: {lessons}"
        yield ("networks", network.name), message


def _of_shape(dense: int, image: tuple[int, int, int]) -> list[str]:
    """Names of the models that see such images and have a dense vector of that width."""
    fits = [name for name, info in catalog.MODELS.items() if (info.dense, info.image) == (dense, image)]
    family = catalog.find(f"mlp-{dense}")
    if family is not None and family.image == image and f"mlp-{dense}" not in fits:
        fits.append(f"mlp-{dense}")
    return fits


def _info(model: str) -> catalog.ModelInfo:
    info = catalog.find(model)
    assert info is not None, f"the schema lets no unknown model through, but here is {model!r}"
    return info


def _by(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
