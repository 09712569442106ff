"""benchmarks.datasets: real data, prepared and read by TensorFlow Datasets without TensorFlow."""

import gzip
import sys

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("grain")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

import PIL.Image  # noqa: E402

from benchmarks import datasets  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def digits(folder):
    return datasets.load("digits", folder)


def test_digits_are_scikit_learns(digits):
    source = sklearn_datasets.load_digits()
    for images, labels, rows in zip(
        (digits.train_images, digits.test_images),
        (digits.train_labels, digits.test_labels),
        datasets.digits_split(source.target),
        strict=True,
    ):
        assert images.dtype == np.float32
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(images[..., 0], source.images[rows] / 16)
        np.testing.assert_array_equal(labels, source.target[rows])
    assert digits.name == "digits"
    assert digits.num_classes == 10
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1


def test_digits_split_is_stratified_and_complete():
    labels = sklearn_datasets.load_digits().target
    train, test = datasets.digits_split(labels)
    assert sorted([*train, *test]) == list(range(1797))
    whole, held = np.bincount(labels), np.bincount(labels[test])
    assert np.all(np.abs(held - whole / 5) < 1)


def test_prepared_data_is_read_again_without_preparing(digits, folder):
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}
    assert files
    arrays = folder / "arrays" / "digits-1.0.0.npz"
    for delete in (False, True):  # from the arrays, and from the records
        if delete:
            arrays.unlink()
        again = datasets.load("digits", folder)
        for one, other in zip(digits, again, strict=True):
            np.testing.assert_array_equal(one, other)
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}
    assert "tensorflow" not in sys.modules


def test_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNAX_DATA_DIR", str(tmp_path))
    assert datasets.data_folder() == tmp_path
    monkeypatch.delenv("PRUNAX_DATA_DIR")
    assert datasets.data_folder().parts[-2:] == (".cache", "prunax")


def test_hold_out_takes_a_fifth_of_the_training_images_and_leaves_the_test_images_out(digits):
    split = datasets.hold_out(digits)
    assert len(split.test_labels) == 288
    assert len(split.train_labels) == 1149
    both = np.concatenate([split.train_images, split.test_images])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in digits.train_images}


def test_fashion_mnist_from_idx_files(monkeypatch, tmp_path):
    """The Debian package's format; the names are its names."""
    rng = np.random.default_rng(0)
    expected = []
    for stem, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            file = tmp_path / f"{stem}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.tobytes()))
        expected.append(
            {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        )
    monkeypatch.setattr(datasets, "FASHION_MNIST_FILES", tmp_path)
    data = datasets.load("fashion_mnist", tmp_path / "prepared")
    assert data.train_images.shape == (30, 28, 28, 1)
    assert data.num_classes == 10
    for images, labels, source in (
        (data.train_images, data.train_labels, expected[0]),
        (data.test_images, data.test_labels, expected[1]),
    ):
        pixels = np.round(images * 255).astype(np.uint8)  # TFDS shuffles: compare as sets
        assert {p.tobytes(): y for p, y in zip(pixels, labels, strict=True)} == source


@pytest.mark.skipif(
    not datasets.FASHION_MNIST_FILES.is_dir(), reason="the Debian package is not installed"
)
def test_debian_files_are_fashion_mnist():
    file = datasets.FASHION_MNIST_FILES / "t10k-labels-idx1-ubyte.gz"
    np.testing.assert_array_equal(np.bincount(datasets._read_idx(file)), [1000] * 10)


def test_other_prepared_data_without_its_builder_code(tmp_path):
    """Images of many sizes and no test split, read from the files alone."""
    with tfds.core.registered.skip_registration():

        class Shades(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["dark", "light"]),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(10):
                    image = PIL.Image.new("RGB", (10 + i, 30 - i), (255 * (i % 2),) * 3)
                    yield i, {"image": image, "label": i % 2}

    Shades(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = datasets.load("shades", tmp_path)
    assert data.train_images.shape == (8, 64, 64, 3)
    assert data.test_images.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(data.train_images.mean((1, 2, 3)), data.train_labels)
    assert data.num_classes == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown data set 'digit'. Did you mean .*digits"),
        ("no such name", "unknown data set 'no such name'"),
        ("ag_news_subset", "not a data set of images with one class label"),
    ],
)
def test_names_that_are_no_image_classification(name, message, tmp_path):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load(name, tmp_path)


def test_no_network_is_told_at_once(monkeypatch, tmp_path):
    for scheme in ("http", "https"):  # a port that refuses
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        datasets.DatasetError, match=r"kmnist is not prepared.*download_and_prepare"
    ):
        datasets.load("kmnist", tmp_path)
