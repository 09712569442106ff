"""Image classification data sets, prepared and read by TensorFlow Datasets without TensorFlow.

`load("digits")` needs no network: the images come from scikit-learn. `load("fashion_mnist")` needs
none where the Debian package `dataset-fashion-mnist` is installed. Any other TensorFlow Datasets
name is read where it is prepared, and downloaded where the network allows.

Prepared data is kept under `$PRUNAX_DATA_DIR`, or `~/.cache/prunax`.
"""

import contextlib
import difflib
import gzip
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

FASHION_MNIST_FILES = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
VARIABLE_SIZE = 64  # images that come in many sizes are resized to this height and width
MAX_BYTES = 8 * 2**30  # as float32; what is larger does not belong in memory

logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of the folders it is about to fill


class DatasetError(ValueError):
    """A data set that cannot be had here, and what to do about it."""


class Dataset(NamedTuple):
    """One data set in memory.

    Attributes:
        name: its TensorFlow Datasets name.
        train_images: float32 in [0, 1], `(n, height, width, channels)`.
        train_labels: int32, `(n,)`.
        test_images: like `train_images`.
        test_labels: like `train_labels`.
        num_classes: labels lie in `[0, num_classes)`.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def data_folder() -> Path:
    """The folder of prepared data: `$PRUNAX_DATA_DIR` or `~/.cache/prunax`."""
    return Path(os.environ.get("PRUNAX_DATA_DIR") or "~/.cache/prunax").expanduser()


def load(name: str = "digits", data_dir: str | os.PathLike | None = None) -> Dataset:
    """Reads a data set into memory, after preparing it where needed.

    Args:
        name: `digits`, `fashion_mnist`, or another TensorFlow Datasets image classification name.
        data_dir: the folder of prepared data; None is `data_folder()`.

    Returns:
        The whole data set. Where it has no test split, that is the validation split, or else the
        last fifth of the training split.

    Raises:
        DatasetError: the name is unknown, the data is neither prepared nor downloadable, or it is
            not image classification.

    Examples:
        >>> digits = load("digits")
        >>> digits.train_images.shape, digits.test_images.shape
        ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    folder = Path(data_dir) if data_dir else data_folder()
    builder = prepared_builder(name, folder)
    image_key, label_key = _classification_keys(builder)
    splits, features = builder.info.splits, builder.info.features
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    names = ("train", held_out) if held_out else ("train[:80%]", "train[80%:]")

    height, width, channels = features[image_key].shape
    shape = (height or VARIABLE_SIZE, width or VARIABLE_SIZE, channels or 3)
    count = sum(splits[split].num_examples for split in names)
    if 4 * count * np.prod(shape) > MAX_BYTES:
        raise DatasetError(f"{name}: {count} images of shape {shape} do not fit into memory.")

    # Decoding is slow (a few thousand images a second), so the arrays are kept.
    file = folder / "arrays" / f"{builder.info.full_name.replace('/', '-')}.npz"
    if not file.is_file():
        arrays = []
        for split in names:
            arrays += _read(_source(builder, split), image_key, label_key, shape)
        _save(file, arrays)
    with np.load(file) as stored:
        arrays = [_normalise(stored[key]) for key in stored.files]
    return Dataset(builder.name, *arrays, num_classes=features[label_key].num_classes)


def hold_out(dataset: Dataset) -> Dataset:
    """Puts every fifth training image in the place of the test images.

    For choosing settings, which the test images must have no part in.
    """
    held = np.arange(len(dataset.train_labels)) % 5 == 0
    return dataset._replace(
        train_images=dataset.train_images[~held],
        train_labels=dataset.train_labels[~held],
        test_images=dataset.train_images[held],
        test_labels=dataset.train_labels[held],
    )


def prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of a data set that stands prepared in a folder, prepared now if need be.

    Args:
        name: as in `load`.
        data_dir: the folder of prepared data. TFDS's own folder is looked through as well.

    Returns:
        A builder whose splits can be read.

    Raises:
        DatasetError: as `load`.
    """
    if name == "digits":
        silence = io.StringIO()  # it is done in a second
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            return _prepare(Digits(data_dir=data_dir, file_format="array_record"))
    try:
        for folder in (data_dir, None):
            builder = tfds.builder(name, data_dir=folder)
            if builder.is_prepared():
                return builder
    except ImportError as error:
        raise DatasetError(f"{name}: TensorFlow Datasets cannot describe it. {error}") from error
    except ValueError as error:
        close = difflib.get_close_matches(name, ["digits", *_tfds_names()])
        raise DatasetError(
            f"unknown data set {name!r}. "
            + (f"Did you mean {', '.join(close)}? " if close else "")
            + "Pass digits, fashion_mnist, or a TensorFlow Datasets name such as mnist or cifar10."
        ) from error
    if builder.name == "fashion_mnist" and FASHION_MNIST_FILES.is_dir():
        return _prepare(_local_fashion_mnist()(data_dir=data_dir, file_format="array_record"))
    _classification_keys(builder)  # before a download that would be for nothing
    _check_reachable(builder)
    return _prepare(tfds.builder(name, data_dir=data_dir, file_format="array_record"))


def digits_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of scikit-learn's digits are for training and which for testing.

    Every fifth image of each class is a test image: stratified, and the same everywhere.

    Args:
        labels: int, `(1797,)`, in scikit-learn's order.

    Returns:
        Increasing indices of the 1437 training and the 360 test images.
    """
    test = np.sort(np.argsort(labels, kind="stable")[::5])
    return np.setdiff1d(np.arange(len(labels)), test), test


with tfds.core.registered.skip_registration():

    class Digits(tfds.core.GeneratorBasedBuilder):
        """scikit-learn's 1797 handwritten digits of 8x8 pixels."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="scikit-learn's digits. Every fifth image of a class is for testing.",
                features=tfds.features.FeaturesDict(
                    {
                        # Pixels have 17 levels, which no 8-bit image holds as exact fractions.
                        "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # keep scikit-learn's order
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            from sklearn.datasets import load_digits

            digits = load_digits()
            train, test = digits_split(digits.target)
            return {
                split: self._generate_examples(digits.images[rows] / 16, digits.target[rows])
                for split, rows in (("train", train), ("test", test))
            }

        def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": image.astype(np.float32)[..., None], "label": label}


def _local_fashion_mnist() -> type[tfds.core.GeneratorBasedBuilder]:
    """TFDS's own Fashion-MNIST builder, reading the files of the Debian package."""
    with tfds.core.registered.skip_registration():

        class FashionMNIST(tfds.builder_cls("fashion_mnist")):
            pkg_dir_path = tfds.builder_cls("fashion_mnist").pkg_dir_path

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
                return {
                    split: self._generate_examples(
                        _read_idx(FASHION_MNIST_FILES / f"{stem}-images-idx3-ubyte.gz"),
                        _read_idx(FASHION_MNIST_FILES / f"{stem}-labels-idx1-ubyte.gz"),
                    )
                    for split, stem in (("train", "train"), ("test", "t10k"))
                }

            def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
                # TFDS encodes a PIL image itself; an array it would hand to TensorFlow.
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield i, {"image": PIL.Image.fromarray(image), "label": label}

    return FashionMNIST


def _read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes from a gzipped IDX file."""
    data = gzip.decompress(path.read_bytes())
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", count=ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    try:
        builder.download_and_prepare()  # returns at once where it is prepared
    except ImportError as error:
        raise DatasetError(
            f"{builder.name}: preparing it needs a package that is not installed ({error}). "
            "Reading it does not: prepare it where the package is, and copy the folder here."
        ) from error
    except OSError as error:  # requests' errors are OSErrors too
        raise DatasetError(f"{builder.name}: could not be prepared. {error}") from error
    return builder


def _check_reachable(builder: tfds.core.DatasetBuilder, timeout: float = 5.0) -> None:
    """Asks for the head of the first file to download. TFDS itself retries for minutes."""
    url = next(iter(builder.url_infos or {}), None)
    if url is None:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return  # the server is there: whether it has the file is for TFDS to say
    except OSError as error:
        hint = " or install the Debian package dataset-fashion-mnist"
        raise DatasetError(
            f"{builder.name} is not prepared, and cannot be downloaded ({error}). Prepare it on a "
            f"machine with network by `tfds.builder({builder.name!r}, "
            'file_format="array_record").download_and_prepare()` and copy its folder into '
            f"$PRUNAX_DATA_DIR{hint if builder.name == 'fashion_mnist' else ''}; "
            "`digits` needs no network."
        ) from error


def _classification_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    features = builder.info.features
    keys = builder.info.supervised_keys
    if (
        keys is None
        or not all(isinstance(key, str) and key in features for key in keys)
        or len(features[keys[0]].shape or ()) != 3
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise DatasetError(f"{builder.name} is not a data set of images with one class label each.")
    return keys[0], keys[1]


def _source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise DatasetError(
            f"{builder.name} is prepared as {builder.info.file_format.value}, which only TensorFlow "
            'reads. Prepare it once more with file_format="array_record".'
        ) from error


def _read(source: Any, image_key: str, label_key: str, shape: tuple[int, int, int]) -> list:
    """All images and labels of one split, as stored."""
    images, labels = [], []
    for example in grain.MapDataset.source(source):
        image = example[image_key]
        if image.shape != shape:
            image = np.asarray(PIL.Image.fromarray(image).convert("RGB").resize(shape[1::-1]))
        images.append(image)
        labels.append(example[label_key])
    return [np.stack(images), np.array(labels, np.int32)]


def _save(file: Path, arrays: list[np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.npz")  # another process may be writing too
    np.savez(partial, *arrays)
    partial.replace(file)


def _normalise(array: np.ndarray) -> np.ndarray:
    return array / np.float32(255) if array.dtype == np.uint8 else array


def _tfds_names() -> list[str]:
    return tfds.list_builders(with_community_datasets=False)
