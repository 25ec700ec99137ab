"""Datasets as uint8 arrays: where they are searched, and how they are read. Without torch, but for a download."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdedge.data import cifar, idx
from kdedge.data.catalog import DATASETS, As, DatasetInfo, find
from kdedge.errors import DataError

SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian's dataset packages put theirs
_STALLED_S = 30  # torchvision sets no limit of its own and would wait for minutes on a network that answers nothing

_READERS = {"idx": idx.read, "cifar": cifar.read}
_LAYOUTS = {
    "idx": "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (or .gz)",
    "cifar": "data_batch_1 to data_batch_5 and test_batch",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset in memory. Images are uint8 [N, C, H, W], labels int64 [N]."""

    name: str
    info: DatasetInfo
    origin: str  # the folder it was read from
    fingerprint: str  # hex SHA-256 over the four arrays, so that it does not matter how they were stored
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load(name: str, data_dir: Path | None = None, as_: As | None = None, *, download: bool = True) -> Dataset:
    """Find dataset `name` and read it; as "rgb32", images of 1x28x28 become 3x32x32.

    It is in `data_dir`/<name>; without `data_dir`, in KDEDGE_DATA/<name>; without that either, in Debian's package or in the
    user's cache, into which torchvision downloads it, if it may. Raises DataError when it is not there or not what it
    claims to be.
    """
    if name not in DATASETS:
        raise DataError(f"There is no dataset {name!r}. Choose one of {', '.join(DATASETS)}.")
    info = DATASETS[name]
    try:
        seen = find(name, as_)
    except ValueError as error:
        raise DataError(f"{name}: as: {error}") from None
    try:
        places = _places(name, info, data_dir)
        if not any(place.is_dir() for place in places):
            if not download:
                raise DataError(f"Dataset {name!r} is in none of {', '.join(map(str, places))}.")
            _download(name, info, places)
        folder = next(place for place in places if place.is_dir())
        if (folder / info.torchvision_folder).is_dir():
            folder = folder / info.torchvision_folder
        train_images, train_labels = _READERS[info.format](folder, "train", info)
        test_images, test_labels = _READERS[info.format](folder, "test", info)
    except OSError as error:
        raise DataError(f"{error.filename or name}: cannot be read: {error.strerror or error}") from None
    if as_ is not None:
        train_images, test_images = _rgb32(train_images), _rgb32(test_images)
    arrays = (train_images, train_labels, test_images, test_labels)
    return Dataset(name, seen, str(folder), _fingerprint(*arrays), *arrays)


def load_recorded(recorded: Mapping[str, Any], data_dir: Path | None = None, *, download: bool = True) -> Dataset:
    """The dataset that a run recorded: its `name`, `as` what, and `fingerprint`. Raises DataError when it is another."""
    dataset = load(recorded["name"], data_dir, recorded.get("as"), download=download)
    if dataset.fingerprint != recorded["fingerprint"]:
        raise DataError(
            f"{dataset.origin} is not the data of this run: expected {dataset.name} with fingerprint "
            f"{recorded['fingerprint']}, found {dataset.fingerprint}. Name the folder of the same data with --data-dir."
        )
    return dataset


def _places(name: str, info: DatasetInfo, data_dir: Path | None) -> list[Path]:
    """The folders that may hold the dataset, in the order of search; the last one is in the user's cache.

    A folder that the user names is the only one: other images than those would be a surprise. Raises DataError when it
    does not hold them.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [SYSTEM_FOLDER / name] if info.debian_package else []
    places.append(Path(cache) / "kdedge" / name)
    source, given = ("--data-dir", str(data_dir)) if data_dir else ("KDEDGE_DATA", os.environ.get("KDEDGE_DATA"))
    if not given:
        return places
    named = Path(given) / name
    if not named.is_dir():
        missing = f"holds no {name}/" if Path(given).is_dir() else "is not a folder"
        raise DataError(
            f"{source} {given!r} {missing}: expected one that holds {_layout(name, info)}. "
            f"Without {source} it is looked for in {', '.join(map(str, places))}."
        )
    return [named]


def _layout(name: str, info: DatasetInfo) -> str:
    return f"{name}/ with {_LAYOUTS[info.format]}"


def _download(name: str, info: DatasetInfo, places: list[Path]) -> None:
    """Let torchvision download into the last place. Raises DataError that names every way to get the data."""
    try:
        _download_whole(info, places[-1])
    # Of torchvision: RuntimeError for a wrong checksum, OSError (URLError is one) and HTTPException from the network.
    except (ImportError, RuntimeError, OSError, HTTPException) as error:
        lines = [
            f"Dataset {name!r} is in none of {', '.join(map(str, places))}. Do one of these:",
            f"  - pass --data-dir DIR or set KDEDGE_DATA=DIR, where DIR holds {_layout(name, info)}",
            f"  - apt-get install {info.debian_package}" if info.debian_package else "",
            f"  - let torchvision download it to {places[-1]}, which failed: {' '.join(str(error).split())}",
        ]
        raise DataError("\n".join(filter(None, lines))) from None


def _download_whole(info: DatasetInfo, folder: Path) -> None:
    """Download beside `folder` and rename: the folder is there and whole, or it is not there."""
    from torchvision import datasets

    folder.parent.mkdir(parents=True, exist_ok=True)
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALLED_S)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            root = Path(temporary) / folder.name
            getattr(datasets, info.torchvision)(root, download=True)
            for archive in root.rglob("*.gz"):  # unpacked by now
                archive.unlink()
            try:
                root.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same files
                    raise
    finally:
        socket.setdefaulttimeout(timeout_s)


def _rgb32(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Uint8 [N, 1, 28, 28] to [N, 3, 32, 32]: a border of two pixels of background, which is 0, and equal channels."""
    return np.repeat(np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))), 3, axis=1)


def _fingerprint(*arrays: NDArray[np.uint8] | NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
