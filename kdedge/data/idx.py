"""Reader of IDX files, the format of MNIST and Fashion-MNIST: a big-endian header, then bytes; gzipped or not.

The files are not ours, so nothing is allocated before the header was compared with what the file can hold.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdedge.data.catalog import DatasetInfo
from kdedge.errors import DataError

# Two zero bytes, the element type (8: uint8), the number of dimensions.
_IMAGES_MAGIC = 0x00000803
_LABELS_MAGIC = 0x00000801
_KINDS = {_IMAGES_MAGIC: "images", _LABELS_MAGIC: "labels"}

_PREFIX = {"train": "train", "test": "t10k"}
_MAX_SAMPLES = 1_000_000  # a header that says more is damaged or hostile, not a larger MNIST
_MAX_GZIP_RATIO = 1032  # deflate cannot do better than 258 bytes from two bits


def read(
    folder: Path, split: Literal["train", "test"], info: DatasetInfo
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, 1, H, W] and labels int64 [N] of one split.

    Raises DataError when a file is missing, damaged, or does not hold what its name says.
    """
    images_file = _file(folder, f"{_PREFIX[split]}-images-idx3-ubyte")
    labels_file = _file(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images = _read_array(images_file, _IMAGES_MAGIC, info.shape[1:])
    labels = _read_array(labels_file, _LABELS_MAGIC, ())
    if len(images) != len(labels):
        raise DataError(
            f"{labels_file}: expected {len(images):,} labels, one for each image of {images_file.name}, "
            f"found {len(labels):,}"
        )
    if labels.max() >= len(info.classes):
        index = int(labels.argmax())
        raise DataError(
            f"{labels_file}: expected labels from 0 to {len(info.classes) - 1}, "
            f"found {labels[index]} at index {index:,}"
        )
    return images.reshape(-1, *info.shape), labels.astype(np.int64)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: {name} is missing (with or without .gz). Add it, or remove the folder to search elsewhere."
    )


def _read_array(path: Path, magic: int, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The file's array, uint8 [N, *item_shape]; the file must hold it and nothing more."""
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as stream:
            count = _read_header(stream, path, magic, item_shape)
            size = count * math.prod(item_shape)
            file_bytes = path.stat().st_size
            if size > file_bytes * (_MAX_GZIP_RATIO if zipped else 1):
                raise DataError(
                    f"{path}: truncated: its header promises {size:,} bytes of data, "
                    f"more than a file of {file_bytes:,} bytes holds"
                )
            content = bytearray(size)
            if (found := stream.readinto(content)) != size:
                raise DataError(f"{path}: truncated: its header promises {size:,} bytes of data, found {found:,}")
            if stream.read(1):  # the end of a gzip file is also where its checksum is compared
                raise DataError(f"{path}: its header promises {size:,} bytes of data, found more")
    except EOFError:
        raise DataError(f"{path}: truncated gzip file: expected an end marker, found none") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(count, *item_shape)


def _read_header(stream: io.BufferedIOBase, path: Path, magic: int, item_shape: tuple[int, ...]) -> int:
    """Check the header and return the number of items."""
    fields = 2 + len(item_shape)
    header = stream.read(4 * fields)
    if len(header) < 4 * fields:
        raise DataError(f"{path}: truncated: expected a header of {4 * fields} bytes, found {len(header)} bytes")
    found_magic, count, *found_shape = struct.unpack(f">{fields}I", header)
    if found_magic != magic:
        kind = f", a file of {_KINDS[found_magic]}" if found_magic in _KINDS else ", not an IDX file of bytes"
        raise DataError(
            f"{path}: expected IDX {_KINDS[magic]} (magic number 0x{magic:08x}), found 0x{found_magic:08x}{kind}"
        )
    if not 1 <= count <= _MAX_SAMPLES:
        raise DataError(f"{path}: expected 1 to {_MAX_SAMPLES:,} {_KINDS[magic]}, found a header that says {count:,}")
    if tuple(found_shape) != item_shape:
        expected, found = ("x".join(map(str, shape)) for shape in (item_shape, found_shape))
        raise DataError(f"{path}: expected images of {expected} pixels, found {found}")
    return int(count)
