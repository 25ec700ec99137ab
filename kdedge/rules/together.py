"""What must hold of a network that takes the same steps as another one and learns from it meanwhile: `fit.with`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

from kdedge.wording import KeyPath, given

Finding = tuple[KeyPath, str]

EPOCHS, BATCH_SIZE = 10, 128
OPTIMIZER: Final = "adam"

_SAME: dict[KeyPath, Any] = {  # with defaults: what makes a step. How far weights move in it is each network's own
    ("fit", "epochs"): EPOCHS,
    ("fit", "batch_size"): BATCH_SIZE,
    ("fit", "optimizer"): OPTIMIZER,
    ("fit", "augment", "flip"): False,
    ("fit", "augment", "shift"): 0,
    ("view", "fraction"): None,
    ("view", "per_class"): None,
    ("view", "classes"): None,
}


def check(written: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[Finding]:
    """What is wrong with `fit.with` in the networks `written`, in plain values."""
    for name, network in written.items():
        partner = _at(network, ("fit", "with"))
        of = written.get(partner) if isinstance(partner, str) and partner != name else None
        if not isinstance(of, dict) or network.get("members") is not None:
            continue
        if of.get("members") is not None:
            yield ("networks", name, "fit", "with"), f"{partner!r} is made of members and does not train; remove `with`"
            continue
        yield from _partner(("networks", name, "fit", "with"), partner, of)
        yield from _own(("networks", name), network, partner)
        for key, default in _SAME.items():
            own, its = _at(network, key, default), _at(of, key, default)
            places = [("networks", one, *key) for one in (name, partner)]
            if own != its and not any(place[: len(path)] == path for place in places for path in refused):
                message = f"expected {given(its)}, as {partner!r} has, with which {name!r} trains (fit.with), got {given(own)}"
                yield places[0], message


def _partner(at: KeyPath, partner: str, of: dict[str, Any]) -> Iterator[Finding]:
    """What the other network must be: it stands on its own, and is what its `fit` makes of it."""
    if (other := _at(of, ("fit", "with"))) is not None:
        yield at, f"{partner!r} trains with {given(other)} itself; name a network that trains with no other"
    later = [key for key in (("improve",), ("head", "fine_tune_epochs")) if _at(of, key)]
    for key in later:
        yield (
            at,
            f"{partner!r} goes on after these steps ({'.'.join(key)}), where nobody trains with it; remove one of both",
        )
    if of.get("impressions") is not None:
        yield at, f"{partner!r} has images of its own (impressions); who trains together sees the same images"


def _own(at: KeyPath, network: dict[str, Any], partner: str) -> Iterator[Finding]:
    lessons = network.get("learns")
    sources = [_at(lesson, (key,)) for lesson in _listed(lessons) for key in ("from", "minus")]
    if not any(partner in _listed(source) for source in sources):
        yield (*at, "fit", "with"), f"nothing is learned from {partner!r}; add a lesson from it, or remove `with`"
    for part in ("head", "quantize"):
        if _at(network, (part, "from")) == partner:
            message = (
                f"{partner!r} is not finished when {at[1]!r} begins to train with it (fit.with); name another network"
            )
            yield (*at, part, "from"), message
    for part, what in (
        ("improve", "fresh members would train without"),
        ("impressions", "images that are not those of"),
    ):
        if network.get(part) is not None:
            yield (*at, part), f"{what} {partner!r}, with which {at[1]!r} trains (fit.with); remove one of both"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _at(value: Any, path: KeyPath, default: Any = None) -> Any:
    """What stands at a path of keys, or the default."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value
