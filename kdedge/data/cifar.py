"""Reader of CIFAR-10's python batches. They are pickles, and a pickle can run anything, so ours runs nothing.

A batch is a dict of bytes, ints, lists and one numpy array. For the few names that takes, the pickle gets stand-ins
that only record what the file says; the array is made here, from bytes whose number was checked.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdedge.data.catalog import DatasetInfo
from kdedge.errors import DataError

_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_META = "batches.meta"
_MAX_FILE_BYTES = 1 << 28  # the published batches have 31 MB


def read(
    folder: Path, split: Literal["train", "test"], info: DatasetInfo
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of one split, the train batches in their order.

    Raises DataError when a file is missing, damaged, or not a CIFAR-10 batch. `batches.meta` may be missing; when it is
    there, its class names must be CIFAR-10's.
    """
    if (folder / _META).is_file():
        _check_classes(folder / _META, info)
    batches = [_read_batch(folder / name, info) for name in _FILES[split]]
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    return images.reshape(-1, *info.shape), labels


def _read_batch(path: Path, info: DatasetInfo) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows of pixels uint8 [n, 3072] and labels int64 [n] of one batch."""
    if not path.is_file():
        raise DataError(f"{path.parent}: {path.name} is missing. Add it, or remove the folder to search elsewhere.")
    batch = _unpickle(path)
    rows = batch.get("data")
    if not isinstance(rows, _Array):
        raise DataError(f"{path}: expected a numpy array under 'data', found {type(rows).__name__}")
    pixels = rows.pixels(path, info.shape[0] * info.shape[1] * info.shape[2])
    labels = batch.get("labels")
    if not isinstance(labels, list):
        raise DataError(f"{path}: expected a list under 'labels', found {type(labels).__name__}")
    if len(labels) != len(pixels):
        raise DataError(f"{path}: expected {len(pixels):,} labels, one for each image, found {len(labels):,}")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(info.classes):
            raise DataError(
                f"{path}: expected labels from 0 to {len(info.classes) - 1}, found {label!r:.40} at index {index:,}"
            )
    return pixels, np.array(labels, np.int64)


def _check_classes(path: Path, info: DatasetInfo) -> None:
    names = _unpickle(path).get("label_names")
    found = [_text(name) for name in names] if isinstance(names, list) else names
    if found != list(info.classes):
        raise DataError(f"{path}: expected the classes {', '.join(info.classes)}, found {found!r:.200}")


def _unpickle(path: Path) -> dict[Any, Any]:
    """The dict in a pickle file, its keys as text. Raises DataError for everything else."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise DataError(f"{path}: expected at most {_MAX_FILE_BYTES:,} bytes, found {path.stat().st_size:,}")
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()  # Python 2 wrote them: its strings are our bytes
    except (DataError, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: not a CIFAR-10 batch: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path}: not a CIFAR-10 batch: damaged pickle ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a CIFAR-10 batch: expected a dict, found {type(content).__name__}")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> object:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Array:
    """Stands for numpy.ndarray: keeps the state that the pickle gives it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def pixels(self, path: Path, width: int) -> NDArray[np.uint8]:
        """The array itself, uint8 [n, width]. Raises DataError when the state is not that of such an array."""
        match self.state:
            case (_, (int(count), int(found_width)), _Dtype(name=name), False, bytes(content)):
                pass
            case _:
                raise DataError(f"{path}: expected a two-dimensional numpy array in C order under 'data'")
        if name not in ("u1", "uint8"):
            raise DataError(f"{path}: expected 'data' of type uint8, found {name!r:.40}")
        if count < 1 or found_width != width:
            raise DataError(f"{path}: expected 'data' of shape [n, {width}], found [{count}, {found_width}]")
        if len(content) != count * width:
            raise DataError(f"{path}: expected {count * width:,} bytes in 'data', found {len(content):,}")
        return np.frombuffer(content, np.uint8).reshape(count, width)


class _Dtype:
    """Stands for numpy.dtype: keeps its name and drops the rest."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        pass


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: object) -> bytes:
    """How Python 3 writes bytes in a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected latin1, found the encoding {encoding!r:.40}")
    return text.encode("latin1")


_NAMES = {
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy._core.multiarray._reconstruct": _new_array,  # since numpy 2.0
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs; not loaded") from None
