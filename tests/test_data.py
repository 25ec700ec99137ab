"""The data shelf: where datasets are searched, both file formats and every way they can be damaged, and the splits."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from kdedge.data import load as load_module
from kdedge.data.catalog import DATASETS
from kdedge.data.load import load, load_recorded
from kdedge.data.splits import split
from kdedge.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NOWHERE = "http://127.0.0.1:9"  # the discard port: a proxy that refuses at once


@pytest.fixture(autouse=True)
def _clean_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No dataset of the machine's own is found, nothing is written outside tmp_path, and the network is down."""
    monkeypatch.delenv("KDEDGE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load_module, "SYSTEM_FOLDER", tmp_path / "system")
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", NOWHERE)


# Files in the exact formats


def idx_images(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: list[int]) -> bytes:
    return struct.pack(">II", 0x801, len(labels)) + bytes(labels)


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def write_idx(folder: Path, zipped: bool = False, seed: int = 0) -> Path:
    """The four IDX files: 6 training images with labels 0 to 5, and 3 test images with labels 9, 8, 7."""
    folder.mkdir(parents=True)
    files = {
        TRAIN_IMAGES: idx_images(pixels(6, 28, 28, seed=seed)),
        TRAIN_LABELS: idx_labels([0, 1, 2, 3, 4, 5]),
        TEST_IMAGES: idx_images(pixels(3, 28, 28, seed=seed + 1)),
        TEST_LABELS: idx_labels([9, 8, 7]),
    }
    for name, content in files.items():
        (folder / f"{name}.gz" if zipped else folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Pickles as Python 2 did, which wrote CIFAR-10: protocol 2, text as byte strings, and the numpy of its time."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        length = bytes([len(content)]) if len(content) < 256 else struct.pack("<i", len(content))
        self.write((pickle.SHORT_BINSTRING if len(content) < 256 else pickle.BINSTRING) + length + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string

    @classmethod
    def dumps(cls, value: object) -> bytes:
        file = io.BytesIO()
        cls(file, 2).dump(value)
        content = file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        return content.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # dtype("u1", 0, 1); today ("u1", False, True)


def python3_dumps(value: dict[str, Any]) -> bytes:
    return pickle.dumps({key.encode(): item for key, item in value.items()}, protocol=2)


def batch(n: int, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "batch_label": b"training batch 1 of 5",
        "labels": [index % 10 for index in range(n)],
        "data": pixels(n, 3072, seed=seed),
        "filenames": [f"leptodactylus_pentadactylus_s_{index:06d}.png".encode() for index in range(n)],
        **changes,
    }


def write_cifar(folder: Path, dumps: Callable[[dict[str, Any]], bytes] = Python2Pickler.dumps) -> Path:
    """Batches 1 to 5 of 1 to 5 images, a test batch of 4 and batches.meta."""
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(dumps(batch(number, seed=number)))
    (folder / "test_batch").write_bytes(dumps(batch(4, seed=6)))
    names = [name.encode() for name in DATASETS["cifar10"].classes]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(dumps(meta))
    return folder


# The real files


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_debian_package_holds_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "SYSTEM_FOLDER", DEBIAN.parent)
    dataset = load("fashion-mnist")
    assert dataset.origin == str(DEBIAN)
    assert dataset.train_images.shape == (60_000, 1, 28, 28) and dataset.test_images.shape == (10_000, 1, 28, 28)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64
    assert np.bincount(dataset.train_labels).tolist() == [6_000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1_000] * 10
    assert dataset.train_images.mean() == pytest.approx(72.94, abs=0.005)
    assert dataset.train_images.std() == pytest.approx(90.02, abs=0.005)
    assert round(dataset.train_images.mean()) == dataset.info.mean
    assert dataset.train_images.std() / 255 == pytest.approx(dataset.info.std, abs=5e-5)


def test_cifar10_std_is_that_of_all_values_together() -> None:
    """From the published figures of the three channels, which have equally many values."""
    means, stds = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    assert round(255 * means.mean()) == DATASETS["cifar10"].mean
    assert np.sqrt((stds**2).mean() + means.var()) == pytest.approx(DATASETS["cifar10"].std, abs=5e-5)


# Where it is searched


def test_data_dir_comes_before_environment_system_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each place holds other images; the places are taken away one by one."""
    option = write_idx(tmp_path / "option" / "fashion-mnist", seed=10)
    environment = write_idx(tmp_path / "environment" / "fashion-mnist", seed=20)
    system = write_idx(tmp_path / "system" / "fashion-mnist", seed=30, zipped=True)
    cache = write_idx(tmp_path / "cache" / "kdedge" / "fashion-mnist" / "FashionMNIST" / "raw", seed=40)
    monkeypatch.setenv("KDEDGE_DATA", str(tmp_path / "environment"))

    datasets = [load("fashion-mnist", tmp_path / "option"), load("fashion-mnist")]
    monkeypatch.delenv("KDEDGE_DATA")
    datasets.append(load("fashion-mnist"))
    system.rename(tmp_path / "gone")
    datasets.append(load("fashion-mnist"))

    assert [dataset.origin for dataset in datasets] == [str(place) for place in (option, environment, system, cache)]
    for dataset, seed in zip(datasets, (10, 20, 30, 40), strict=True):
        assert np.array_equal(dataset.train_images[:, 0], pixels(6, 28, 28, seed=seed))


def test_data_dir_without_the_dataset_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_idx(tmp_path / "option" / "mnist")
    system = write_idx(tmp_path / "system" / "fashion-mnist")
    said = rf"'.*/option' holds no fashion-mnist/: expected one that holds fashion-mnist/ with {TRAIN_IMAGES}"
    with pytest.raises(DataError, match=f"^--data-dir {said}") as caught:
        load("fashion-mnist", tmp_path / "option")
    cache = tmp_path / "cache" / "kdedge" / "fashion-mnist"
    assert str(caught.value).endswith(f"Without --data-dir it is looked for in {system}, {cache}.")
    monkeypatch.setenv("KDEDGE_DATA", str(tmp_path / "option"))
    with pytest.raises(DataError, match=f"^KDEDGE_DATA {said}"):
        load("fashion-mnist")


def test_data_dir_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_idx(tmp_path / "system" / "fashion-mnist")
    with pytest.raises(DataError, match=r"--data-dir '.*/nope' is not a folder: .* fashion-mnist/ with train-images"):
        load("fashion-mnist", tmp_path / "nope")
    monkeypatch.setenv("KDEDGE_DATA", str(tmp_path / "nope"))
    with pytest.raises(DataError, match=r"KDEDGE_DATA '.*/nope' is not a folder"):
        load("fashion-mnist")


def test_unknown_name_lists_the_datasets() -> None:
    with pytest.raises(DataError, match=r"no dataset 'fashion'. Choose one of fashion-mnist, mnist, cifar10"):
        load("fashion")


def test_when_all_places_fail_one_error_names_all_ways(tmp_path: Path) -> None:
    """torchvision really tries; the proxy refuses."""
    with pytest.raises(DataError) as caught:
        load("fashion-mnist")
    first, option, debian, download = str(caught.value).splitlines()
    assert first == (
        f"Dataset 'fashion-mnist' is in none of {tmp_path}/system/fashion-mnist, {tmp_path}/cache/kdedge/fashion-mnist. "
        "Do one of these:"
    )
    assert "--data-dir DIR or set KDEDGE_DATA=DIR" in option and f"fashion-mnist/ with {TRAIN_IMAGES}" in option
    assert debian == "  - apt-get install dataset-fashion-mnist"
    assert "torchvision" in download and "Connection refused" in download
    assert list((tmp_path / "cache" / "kdedge").iterdir()) == []


def test_without_download_the_places_are_all_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_recorded({"name": "mnist", "fingerprint": ""}, download=False)
    assert str(caught.value) == f"Dataset 'mnist' is in none of {tmp_path}/cache/kdedge/mnist."


@pytest.mark.parametrize(("name", "first_file"), [("mnist", TRAIN_IMAGES), ("cifar10", "data_batch_1")])
def test_without_a_debian_package_the_error_names_two_ways(name: str, first_file: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    _, option, download = str(caught.value).splitlines()
    assert f"{name}/ with {first_file}" in option
    assert "torchvision" in download and "Connection refused" in download


def test_cache_that_cannot_be_written_is_part_of_the_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist\n.* which failed: .*cache"):
        load("fashion-mnist")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of a web server on this machine, and the folder it serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = tmp_path / "served"
    served.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", served
        httpd.shutdown()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_torchvision_downloads_fashion_mnist_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: tuple[str, Path]
) -> None:
    from torchvision.datasets import FashionMNIST

    address, served = server
    source = write_idx(served / "files", zipped=True)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{address}files/"])
    monkeypatch.setattr(FashionMNIST, "resources", [(file.name, md5(file)) for file in sorted(source.iterdir())])
    first = load("fashion-mnist")
    raw = tmp_path / "cache" / "kdedge" / "fashion-mnist" / "FashionMNIST" / "raw"
    assert first.origin == str(raw)
    assert sorted(file.name for file in raw.iterdir()) == [TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS]
    assert np.array_equal(first.train_images[:, 0], pixels(6, 28, 28))

    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    assert load("fashion-mnist").fingerprint == first.fingerprint


def test_torchvision_downloads_cifar10_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: tuple[str, Path]
) -> None:
    from torchvision.datasets import CIFAR10

    address, served = server
    source = write_cifar(tmp_path / "source" / "cifar-10-batches-py")
    with tarfile.open(served / "cifar.tar.gz", "w:gz") as archive:
        archive.add(source, "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "url", f"{address}cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(served / "cifar.tar.gz"))
    batches = [[f"data_batch_{number}", md5(source / f"data_batch_{number}")] for number in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(source / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(source / "batches.meta")})
    dataset = load("cifar10")
    cache = tmp_path / "cache" / "kdedge" / "cifar10"
    assert dataset.origin == str(cache / "cifar-10-batches-py")
    assert [file.name for file in cache.iterdir()] == ["cifar-10-batches-py"]
    assert dataset.train_images.shape == (15, 3, 32, 32)


def test_download_with_a_wrong_checksum_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: tuple[str, Path]
) -> None:
    from torchvision.datasets import MNIST

    address, served = server
    source = write_idx(served / "files", zipped=True)
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}files/"])
    monkeypatch.setattr(MNIST, "resources", [(file.name, "0" * 32) for file in sorted(source.iterdir())])
    with pytest.raises(DataError, match=r"which failed: .*File not found or corrupted"):
        load("mnist")
    assert list((tmp_path / "cache" / "kdedge").iterdir()) == []


# IDX files


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "data" / "mnist")


def test_idx_arrays_are_exact_and_writable(idx_folder: Path) -> None:
    dataset = load("mnist", idx_folder.parent)
    assert np.array_equal(dataset.train_images, pixels(6, 28, 28).reshape(6, 1, 28, 28))
    assert np.array_equal(dataset.test_images, pixels(3, 28, 28, seed=1).reshape(3, 1, 28, 28))
    assert dataset.train_labels.tolist() == [0, 1, 2, 3, 4, 5] and dataset.test_labels.tolist() == [9, 8, 7]
    assert dataset.train_images.flags.writeable and dataset.train_labels.flags.writeable  # torch warns otherwise


def test_images_as_rgb32_are_padded_with_background_and_have_equal_channels(idx_folder: Path) -> None:
    plain, wide = load("mnist", idx_folder.parent), load("mnist", idx_folder.parent, "rgb32")
    for given, images in ((plain.train_images, wide.train_images), (plain.test_images, wide.test_images)):
        expected = np.zeros((len(given), 3, 32, 32), np.uint8)
        expected[:, :, 2:30, 2:30] = given  # one channel on three
        assert images.dtype == np.uint8 and np.array_equal(images, expected)
    assert wide.info == dataclasses.replace(plain.info, shape=(3, 32, 32))
    assert wide.fingerprint != plain.fingerprint
    assert (
        load_recorded({"name": "mnist", "as": "rgb32", "fingerprint": wide.fingerprint}, idx_folder.parent).info
        == wide.info
    )
    with pytest.raises(DataError, match="is not the data of this run"):
        load_recorded({"name": "mnist", "fingerprint": wide.fingerprint}, idx_folder.parent)
    with pytest.raises(DataError, match="cifar10: as: rgb32 is for images of 1 x 28 x 28"):
        load("cifar10", idx_folder.parent, "rgb32")


def test_fingerprint_is_the_same_for_gz_and_plain_and_changes_with_any_byte(idx_folder: Path, tmp_path: Path) -> None:
    plain = load("mnist", idx_folder.parent).fingerprint
    write_idx(tmp_path / "zipped" / "mnist", zipped=True)
    assert load("mnist", tmp_path / "zipped").fingerprint == plain
    path = idx_folder / TEST_LABELS
    path.write_bytes(path.read_bytes()[:-1] + b"\x06")
    assert load("mnist", idx_folder.parent).fingerprint != plain


ONE_IMAGE = np.zeros((1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            TRAIN_IMAGES,
            idx_images(pixels(6, 28, 28))[:-100],
            "truncated: its header promises 4,704 bytes .* 4,620 byte",
        ),
        (TRAIN_IMAGES, idx_images(pixels(6, 28, 28))[:-1], "truncated: its header promises 4,704 bytes .* found 4,703"),
        (TRAIN_IMAGES, idx_images(pixels(6, 28, 28)) + b"\0", "promises 4,704 bytes of data, found more"),
        (TRAIN_IMAGES, b"", "truncated: expected a header of 16 bytes, found 0 bytes"),
        (TRAIN_IMAGES, idx_labels([1, 2, 3]) + bytes(16), r"expected IDX images .* found 0x00000801, a file of labels"),
        (TRAIN_LABELS, idx_images(ONE_IMAGE), r"expected IDX labels .* found 0x00000803, a file of images"),
        (TRAIN_LABELS, b"\0\0\x0d\x01" + bytes(4), r"found 0x00000d01, not an IDX file of bytes"),
        (TRAIN_LABELS, b"<!DOCTYPE html>", r"found 0x3c21444f, not an IDX file of bytes"),
        (TRAIN_IMAGES, idx_images(pixels(6, 32, 32)), "expected images of 28x28 pixels, found 32x32"),
        (
            TRAIN_LABELS,
            idx_labels([0, 1, 2, 3, 4]),
            f"expected 6 labels, one for each image of {TRAIN_IMAGES}, found 5",
        ),
        (TRAIN_LABELS, idx_labels([0, 1, 10, 3, 4, 5]), "expected labels from 0 to 9, found 10 at index 2"),
        (TEST_LABELS, idx_labels([9, 8, 255]), "expected labels from 0 to 9, found 255 at index 2"),
        (TEST_LABELS, idx_labels([]), "expected 1 to 1,000,000 labels, found a header that says 0"),
        (TEST_IMAGES, struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28), "found a header that says 4,294,967,295"),
        (TEST_IMAGES, struct.pack(">IIII", 0x803, 10**6, 28, 28), "promises 784,000,000 bytes .* file of 16 bytes"),
    ],
)
def test_damaged_idx_file_is_refused(idx_folder: Path, file: str, content: bytes, message: str) -> None:
    (idx_folder / file).write_bytes(content)
    with pytest.raises(DataError, match=f"^{idx_folder / file}: .*{message}"):
        load("mnist", idx_folder.parent)


GOOD = gzip.compress(idx_images(pixels(6, 28, 28)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-12], "truncated gzip file"),
        (GOOD[:-8] + bytes(4) + GOOD[-4:], "damaged gzip file: CRC check failed"),
        (GOOD[:2000] + b"\xff" * 50 + GOOD[2050:], "damaged gzip file"),
        (gzip.decompress(GOOD), "damaged gzip file: Not a gzipped file"),
        (gzip.compress(idx_images(pixels(6, 28, 28))[:-1]), "truncated: its header promises 4,704 .* found 4,703"),
        (gzip.compress(idx_images(ONE_IMAGE) + bytes(10**7)), "promises 784 bytes of data, found more"),
        (gzip.compress(struct.pack(">IIII", 0x803, 10**6, 28, 28)), "promises 784,000,000 bytes .* file of 3. bytes"),
    ],
)
def test_damaged_gzip_file_is_refused(idx_folder: Path, content: bytes, message: str) -> None:
    (idx_folder / TRAIN_IMAGES).unlink()
    path = idx_folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        load("mnist", idx_folder.parent)


@pytest.mark.parametrize("file", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_folder_that_lacks_one_file_is_refused(idx_folder: Path, file: str) -> None:
    (idx_folder / file).unlink()
    with pytest.raises(DataError, match=rf"^{idx_folder}: {file} is missing \(with or without .gz\)"):
        load("mnist", idx_folder.parent)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_that_may_not_be_read_is_named(idx_folder: Path) -> None:
    (idx_folder / TRAIN_IMAGES).chmod(0)
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES}: cannot be read: Permission denied"):
        load("mnist", idx_folder.parent)


# CIFAR-10 batches


@pytest.mark.parametrize("dumps", [Python2Pickler.dumps, python3_dumps, partial(pickle.dumps, protocol=4)])
@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_is_read_as_published_and_as_python_3_writes_it(
    tmp_path: Path, dumps: Callable[[dict[str, Any]], bytes], nested: bool
) -> None:
    """The reference is the array that was written: rows of 1,024 red, 1,024 green and 1,024 blue pixels."""
    folder = write_cifar(tmp_path / "cifar10" / ("cifar-10-batches-py" if nested else ""), dumps)
    dataset = load("cifar10", tmp_path)
    assert Path(dataset.origin) == folder
    rows = np.concatenate([pixels(number, 3072, seed=number) for number in range(1, 6)])
    assert dataset.train_images.shape == (15, 3, 32, 32) and dataset.test_images.shape == (4, 3, 32, 32)
    assert np.array_equal(dataset.train_images[:, 1].reshape(15, 1024), rows[:, 1024:2048])
    assert np.array_equal(dataset.test_images.reshape(4, 3072), pixels(4, 3072, seed=6))
    assert dataset.train_labels.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert dataset.train_labels.dtype == np.int64 and dataset.train_images.dtype == np.uint8
    assert dataset.train_images.flags.writeable


def test_python2_pickler_writes_what_python_2_wrote() -> None:
    """Byte strings, the old numpy names, and a dtype with ints for its flags."""
    assert Python2Pickler.dumps({"batch_label": b"training batch 1 of 5"}).startswith(
        b"\x80\x02}q\x00U\x0bbatch_labelq\x01U\x15training batch 1 of 5"
    )
    content = Python2Pickler.dumps(batch(1, seed=0))
    assert (
        b"cnumpy.core.multiarray\n_reconstruct\n" in content and b"U\x02u1" in content and b"K\x00K\x01\x87" in content
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch(3, 0, labels=[0, 1]), "expected 3 labels, one for each image, found 2"),
        (batch(3, 0, labels=[0, 10, 1]), "expected labels from 0 to 9, found 10 at index 1"),
        (batch(3, 0, labels=[0, 1, -1]), "expected labels from 0 to 9, found -1 at index 2"),
        (batch(3, 0, labels=[0, 1, b"cat"]), "expected labels from 0 to 9, found b'cat' at index 2"),
        (batch(3, 0, labels=None), "expected a list under 'labels', found NoneType"),
        (batch(3, 0, data=b"x" * 3072), "expected a numpy array under 'data', found bytes"),
        (batch(3, 0, data=pixels(3, 1024)), r"expected 'data' of shape \[n, 3072\], found \[3, 1024\]"),
        (batch(3, 0, data=pixels(3, 3, 1024)), "expected a two-dimensional numpy array in C order"),
        (batch(3, 0, data=np.asfortranarray(pixels(3, 3072))), "expected a two-dimensional numpy array in C order"),
        (batch(3, 0, data=np.zeros((3, 3072), np.int64)), "expected 'data' of type uint8, found 'i8'"),
        (batch(0, 0), r"expected 'data' of shape \[n, 3072\], found \[0, 3072\]"),
        ({"fine_labels": [1]}, "expected a numpy array under 'data', found NoneType"),
        ([1, 2, 3], "not a CIFAR-10 batch: expected a dict, found list"),
    ],
)
def test_wrong_cifar10_batch_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = write_cifar(tmp_path / "cifar10") / "data_batch_3"
    path.write_bytes(Python2Pickler.dumps(content))
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        load("cifar10", tmp_path)


def test_cifar10_array_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    """The pickle is whole, but the array's bytes are fewer than its shape says."""
    path = write_cifar(tmp_path / "cifar10") / "test_batch"
    short = pickle.BINSTRING + struct.pack("<i", 4 * 3072)
    content = path.read_bytes()
    start = content.index(short) + len(short)
    path.write_bytes(
        content.replace(short, pickle.BINSTRING + struct.pack("<i", 4 * 3072 - 1)).replace(
            content[start : start + 4 * 3072], content[start : start + 4 * 3072 - 1]
        )
    )
    with pytest.raises(DataError, match=f"^{path}: expected 12,288 bytes in 'data', found 12,287"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\x80\x02}q\x00", b"not a pickle", bytes(100), b"\x80\x02]K\x01s."])
def test_damaged_pickle_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = write_cifar(tmp_path / "cifar10") / "data_batch_1"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=f"^{path}: not a CIFAR-10 batch: "):
        load("cifar10", tmp_path)


def test_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = write_cifar(tmp_path / "cifar10") / "data_batch_5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"^{path}: not a CIFAR-10 batch: "):
        load("cifar10", tmp_path)


@dataclasses.dataclass
class Call:
    """Unpickled, calls function(*arguments)."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_runs_nothing(tmp_path: Path, file: str, protocol: int) -> None:
    path = write_cifar(tmp_path / "cifar10") / file
    attack = batch(1, seed=0, batch_label=Call(os.system, (f"touch {tmp_path}/pwned",)))
    path.write_bytes(pickle.dumps(attack, protocol))
    with pytest.raises(
        DataError, match=rf"^{path}: .* asks for (posix|os).system, which no such file needs; not loaded"
    ):
        load("cifar10", tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_encoding_other_than_latin1_is_refused(tmp_path: Path) -> None:
    """Encodings are looked up by name among all codecs of the interpreter, so only one is let through."""
    import codecs

    path = write_cifar(tmp_path / "cifar10") / "test_batch"
    path.write_bytes(pickle.dumps({"data": Call(codecs.encode, ("a", "rot13"))}, 2))
    with pytest.raises(DataError, match=f"^{path}: .*expected latin1, found the encoding 'rot13'"):
        load("cifar10", tmp_path)


def test_cifar10_folder_that_lacks_a_batch_is_refused(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "cifar10")
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match=f"^{folder}: data_batch_4 is missing"):
        load("cifar10", tmp_path)


def test_batches_meta_of_another_dataset_is_refused(tmp_path: Path) -> None:
    path = write_cifar(tmp_path / "cifar10") / "batches.meta"
    path.write_bytes(Python2Pickler.dumps({"label_names": [b"apple", b"aquarium_fish"]}))
    with pytest.raises(
        DataError, match=rf"^{path}: expected the classes airplane, .*found \['apple', 'aquarium_fish'\]"
    ):
        load("cifar10", tmp_path)
    path.unlink()
    assert load("cifar10", tmp_path).train_images.shape == (15, 3, 32, 32)


# Splits


def test_splits_cover_the_training_set_without_overlap() -> None:
    splits = split(60_000, seed=0, validation=5_000, calibration=512)
    parts = (splits.train, splits.validation, splits.calibration)
    assert [len(part) for part in parts] == [54_488, 5_000, 512]
    assert all(part.dtype == np.int64 for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(60_000))


def test_limit_cuts_the_train_part_only_and_takes_from_all_of_it() -> None:
    whole = split(60_000, seed=0, validation=5_000, calibration=512)
    small = split(60_000, seed=0, validation=5_000, calibration=512, limit=1_000)
    assert np.array_equal(small.validation, whole.validation) and np.array_equal(small.calibration, whole.calibration)
    assert len(small.train) == 1_000 and np.isin(small.train, whole.train).all()
    # Uniform on 0..59,999: the mean of 1,000 draws has a standard error of 548.
    assert abs(small.train.mean() - 30_000) < 4 * 548
    assert len(split(100, seed=0, validation=10, calibration=10, limit=1_000).train) == 80


def test_seed_decides_the_splits() -> None:
    one, again, other = (split(1_000, seed, validation=100, calibration=50) for seed in (1, 1, 2))
    assert np.array_equal(one.train, again.train) and one.fingerprint == again.fingerprint
    assert not np.array_equal(one.validation, other.validation) and one.fingerprint != other.fingerprint


def test_fingerprint_tells_which_part_a_sample_is_in() -> None:
    splits = split(100, seed=0, validation=10, calibration=10)
    swapped = dataclasses.replace(splits, validation=splits.calibration, calibration=splits.validation)
    assert splits.fingerprint != swapped.fingerprint


@pytest.mark.parametrize(
    ("validation", "calibration", "limit"), [(60, 40, None), (100, 1, None), (-1, 10, None), (10, -1, None), (1, 1, 0)]
)
def test_splits_that_leave_nothing_to_train_on_are_refused(
    validation: int, calibration: int, limit: int | None
) -> None:
    with pytest.raises(DataError, match=f"Cannot cut 100 training samples into {validation} for validation"):
        split(100, 0, validation, calibration, limit)


# Imports


def loaded_modules(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_catalog_needs_no_numpy_and_reading_needs_no_torch(idx_folder: Path) -> None:
    write_cifar(idx_folder.parent / "cifar10")
    assert not loaded_modules("import kdedge.data.catalog") & {"numpy", "torch", "torchvision"}
    reading = (
        "from pathlib import Path\nfrom kdedge.data.load import load\nimport kdedge.data.splits\n"
        f"load('mnist', Path({str(idx_folder.parent)!r}))\nload('cifar10', Path({str(idx_folder.parent)!r}))"
    )
    assert not loaded_modules(reading) & {"torch", "torchvision"}
