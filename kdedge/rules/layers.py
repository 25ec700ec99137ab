"""What must hold of a lesson on layers: the layers are there, and their maps have one height and width."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kdedge.losses import OF_LAYERS
from kdedge.models import catalog
from kdedge.wording import KeyPath, given

Finding = tuple[KeyPath, str]


def check(written: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[Finding]:
    """What is wrong with the lessons on layers of the networks `written`, in plain values."""
    known = {name: network for name, network in written.items() if _is_known(name, network, refused)}
    for name, network in written.items():
        lessons = network.get("learns") if isinstance(network, dict) else None
        for n, lesson in enumerate(lessons if isinstance(lessons, list | tuple) else ()):
            at: KeyPath = ("networks", name, "learns", n)
            if isinstance(lesson, dict) and not any(path[:4] == at for path in refused) and lesson["loss"] in OF_LAYERS:
                yield from _lesson(at, lesson, known)


def _is_known(name: str, network: Any, refused: Collection[KeyPath]) -> bool:
    """Whether it is known what the network is made of."""
    if not isinstance(network, dict) or not (network.get("model") or network.get("members")):
        return False
    return not any(path[:3] == ("networks", name, key) for path in refused for key in ("model", "count", "members"))


def _lesson(at: KeyPath, lesson: dict[str, Any], networks: dict[str, Any]) -> Iterator[Finding]:
    sources = [lesson["from"]] if isinstance(lesson["from"], str) else lesson["from"]
    ours: catalog.Shape | None = None
    for name, key in ((str(at[1]), "layer"), *((source, "from_layer") for source in sources)):
        if name not in networks:
            continue
        if (model := _only_model(networks[name])) is None:
            yield at, f"{lesson['loss']} compares layers of networks of one model; {name!r} is made of several"
            continue
        layers, layer = catalog.layers(model), lesson[key]
        if layer not in layers:
            known = f"its layers: {', '.join(layers)}" if layers else "none of its layers has maps"
            yield (*at, key), f"{model} has no layer {given(layer)}; {known}"
        elif key == "layer":
            ours = layers[layer]
        elif ours and ours[1:] != layers[layer][1:]:
            fits = ", ".join(other for other, shape in layers.items() if shape[1:] == ours[1:])
            maps = f"{_size(layers[layer])} maps, {lesson['layer']!r} of {at[1]!r} {_size(ours)}"
            yield (*at, key), f"{layer!r} of {name!r} has {maps}" + (f"; use {fits}" if fits else "")


def _only_model(network: dict[str, Any]) -> str | None:
    """The model of a network that has one; a group of one has one."""
    if isinstance(model := network.get("model"), str):
        return model if network.get("count") in (None, 1) else None
    return model[0] if model and len(model) == 1 else None


def _size(shape: catalog.Shape) -> str:
    return f"{shape[1]} x {shape[2]}"
