"""What a recipe may ask of the data: images enough, classes that there are, and pixels that images have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from kdedge.data.catalog import DatasetInfo
from kdedge.wording import KeyPath, unknown

VALIDATION, CALIBRATION = 5000, 512  # training images that are kept, where a recipe does not say how many


def check_sizes(
    data: dict[str, Any], published: DatasetInfo, refused: Collection[KeyPath]
) -> Iterator[tuple[KeyPath, str]]:
    """That the plain values of `data` leave an image to train on. Files may hold fewer: then splits.py refuses the cut."""
    if {("data", "validation"), ("data", "calibration")} & {*refused}:
        return
    validation, calibration = data.get("validation", VALIDATION), data.get("calibration", CALIBRATION)
    if validation + calibration >= published.train_images:
        kept = f"validation ({validation:,}) and calibration ({calibration:,})"
        yield ("data",), f"{kept} leave nothing to train on of {published.train_images:,} images; keep fewer"


def check(written: dict[str, Any], data: DatasetInfo, refused: Collection[KeyPath]) -> Iterator[tuple[KeyPath, str]]:
    """What views leave, and lessons compare, that `data` does not have; `written` are the plain values of all networks."""
    for name, network in written.items():
        if not isinstance(network, dict):
            continue
        at: KeyPath = ("networks", name)
        if isinstance(view := network.get("view"), dict):
            yield from _view((*at, "view"), view, data, refused)
        lessons = network.get("learns")
        for n, lesson in enumerate(lessons if isinstance(lessons, list | tuple) else ()):
            place: KeyPath = (*at, "learns", n, "classes")
            if isinstance(lesson, dict) and isinstance(lesson.get("classes"), list | tuple) and place not in refused:
                yield from _classes(place, lesson["classes"], data, refused)
                if len(lesson["classes"]) == 1:
                    yield place, "among one class there is nothing to compare; name two or more"


def _view(
    at: KeyPath, view: dict[str, Any], data: DatasetInfo, refused: Collection[KeyPath]
) -> Iterator[tuple[KeyPath, str]]:
    right = {key: value for key, value in view.items() if value is not None and (*at, key) not in refused}
    side = data.shape[-1]
    if "resize" in right and (side % right["resize"] or right["resize"] == side):
        fits = ", ".join(str(n) for n in range(side - 1, 0, -1) if side % n == 0)
        yield (*at, "resize"), f"{side} pixels are not {right['resize']} blocks of two or more; use {fits}"
    if "centre" in right and right["centre"] >= side:
        message = f"of images of {side} x {side} expected 1 to {side - 1} pixels, got {right['centre']}"
        yield (*at, "centre"), message
    yield from _classes((*at, "classes"), right.get("classes", ()), data, refused)


def _classes(
    at: KeyPath, classes: Sequence[str | int], data: DatasetInfo, refused: Collection[KeyPath]
) -> Iterator[tuple[KeyPath, str]]:
    seen = set()
    for n, one in enumerate(classes):
        if (*at, n) in refused:
            continue
        if isinstance(one, str) and one not in data.classes:
            yield (*at, n), unknown("class", one, data.classes)
        elif isinstance(one, int) and not 0 <= one < len(data.classes):
            yield (*at, n), f"expected a class from 0 to {len(data.classes) - 1}, got {one}"
        elif (number := data.class_number(one)) in seen:
            yield (*at, n), f"{one!r} is in the list twice"
        else:
            seen.add(number)
