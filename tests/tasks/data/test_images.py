"""Image data sets: every format against files that the test writes, and what is refused."""

import gzip
import hashlib
import http.server
import importlib
import io
import json
import tarfile
import threading

import numpy as np
import pytest
import tiny
import torch

from lmnas.core.errors import UserError
from lmnas.tasks.data import download
from lmnas.tasks.data.formats import cifar, source
from lmnas.tasks.data.formats.cifar import CIFAR10
from lmnas.tasks.data.images import open_images, read_pictures

N = 3
"""Images of a batch; the published ones have 10,000."""


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("LMNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LMNAS_DATA", raising=False)


def batch(number, n=N):
    """(n, 3, 32, 32) images and labels of the batch."""
    draws = np.random.default_rng(number)
    return draws.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), draws.integers(0, 10, n)


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
ALL = {name: batch(number) for number, name in enumerate(NAMES)}


def binary(pixels, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))


def members(batches=ALL):
    return {f"{name}.bin": binary(*part) for name, part in batches.items()} | {
        "batches.meta.txt": ("\n".join(CIFAR10) + "\n\n").encode()
    }


def archive(path, files, folder):
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return path


def same_as_all(found):
    """Whether a data set holds the images of ALL in the order of the batches."""
    pixels = np.concatenate([ALL[name][0] for name in NAMES[:5]])
    labels = np.concatenate([ALL[name][1] for name in NAMES[:5]])
    return (
        np.array_equal(found.images["train"], pixels)
        and np.array_equal(found.labels["train"], labels)
        and np.array_equal(found.images["test"], ALL["test_batch"][0])
        and np.array_equal(found.labels["test"], ALL["test_batch"][1])
    )


def test_the_archive_and_the_folder_that_it_unpacks_to(tmp_path):
    folder = "cifar-10-batches-bin"
    path = archive(tmp_path / "mine.tar.gz", members(), folder)
    found = open_images(str(path))
    assert same_as_all(found) and found.classes == list(CIFAR10) and found.size == (32, 32)
    assert found.name == "mine.tar.gz" and found.n_valid == 1  # a tenth of 15
    again = open_images(str(path))  # from the cache
    assert same_as_all(again) and again.fingerprint == found.fingerprint
    unpacked = tmp_path / "data" / folder
    unpacked.mkdir(parents=True)
    for name, content in members().items():
        (unpacked / name).write_bytes(content)
    assert same_as_all(open_images(str(unpacked))) and same_as_all(open_images(str(unpacked.parent)))


def test_the_python_archive_is_not_read(tmp_path):
    """Its batches are pickles; the refusal says what is read."""
    pickles = {name: b"\x80\x02}q\x01." for name in NAMES}
    path = archive(tmp_path / "cifar-10-python.tar.gz", pickles, "cifar-10-batches-py")
    unpacked = tmp_path / "unpacked" / "cifar-10-batches-py"
    unpacked.mkdir(parents=True)
    (unpacked / "data_batch_1").write_bytes(pickles["data_batch_1"])
    for place in (path, tmp_path, unpacked, unpacked.parent):
        message = refusal(place)
        assert "holds pickles, which are not read; expected cifar-10-binary.tar.gz, parquet" in message


def test_data_that_change_while_they_are_read_are_not_cached(tmp_path, monkeypatch):
    """The fingerprint is that of the bytes that are decoded."""
    path = archive(tmp_path / "mine.tar.gz", members(), "cifar-10-batches-bin")
    digest = cifar.sha256

    def then_replaced(place):
        found = digest(place)
        archive(path, members({name: batch(9) for name in NAMES}), "cifar-10-batches-bin")
        return found

    monkeypatch.setattr(cifar, "sha256", then_replaced)
    assert "mine.tar.gz changed while it was read; try again" in refusal(path)
    assert not list((tmp_path / "cache").glob("images/*/meta.json"))


def refusal(*arguments, **settings):
    with pytest.raises(UserError) as caught:
        open_images(*map(str, arguments), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_archives(tmp_path):
    whole = archive(tmp_path / "whole.tar.gz", members(), "cifar-10-batches-bin").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert "not a .tar.gz archive, or damaged" in refusal(tmp_path / "cut.tar.gz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "flipped.tar.gz").write_bytes(flipped)
    assert "damaged" in refusal(tmp_path / "flipped.tar.gz")
    (tmp_path / "text.tar.gz").write_bytes(b"no archive")
    assert "not a .tar.gz archive, or damaged" in refusal(tmp_path / "text.tar.gz")
    (tmp_path / "gzipped.tar.gz").write_bytes(gzip.compress(b"no tape"))
    assert "not a .tar.gz archive, or damaged" in refusal(tmp_path / "gzipped.tar.gz")
    fewer = {name: content for name, content in members().items() if name != "data_batch_3.bin"}
    path = archive(tmp_path / "fewer.tar.gz", fewer, "cifar-10-batches-bin")
    assert "data_batch_3.bin is missing" in refusal(path)
    path = archive(tmp_path / "short.tar.gz", members() | {"test_batch.bin": bytes(3000)}, "cifar-10-batches-bin")
    assert "test_batch has 3,000 bytes; expected records of 3,073" in refusal(path)
    eleven = {**ALL, "test_batch": (ALL["test_batch"][0], np.array([1, 11, 2]))}
    path = archive(tmp_path / "eleven.tar.gz", members(eleven), "cifar-10-batches-bin")
    assert "split test: image 1 has label 11; there are 10 classes" in refusal(path)
    assert not list((tmp_path / "cache").glob("images/*/meta.json"))


def test_members_that_point_elsewhere_are_not_followed(tmp_path):
    """Nothing of an archive is written to disk, and a link is not read."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(binary(*ALL["test_batch"]))
    path = tmp_path / "link.tar.gz"
    with tarfile.open(path, "w:gz") as bundle:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        bundle.addfile(link)
    assert "is a link or a device" in refusal(path)
    before = set(tmp_path.rglob("*"))
    path = archive(tmp_path / "up.tar.gz", members(), "../cifar-10-batches-bin")
    assert "data_batch_1.bin is missing" in refusal(path)
    assert set(tmp_path.rglob("*")) == before | {path}


def test_the_published_name(tmp_path, monkeypatch):
    """In its folder whatever the layout; an archive there must be the published one."""
    monkeypatch.setenv("LMNAS_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    path = archive(folder / "cifar-10-binary.tar.gz", members(), "cifar-10-batches-bin")
    assert "its checksum is md5 " in refusal("cifar10") and "c32a1d4ab5d03f1284b67883e8d87530" in refusal("cifar10")
    right = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(download.REMOTES, "cifar10", (download.Remote("", right),))
    found = open_images("cifar10")
    assert same_as_all(found) and found.name == "cifar10"


def test_a_download_with_a_wrong_checksum_is_dropped(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    path = archive(served / "cifar-10-binary.tar.gz", members(), "cifar-10-batches-bin")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("LMNAS_DATA", str(tmp_path / "data"))
    right = hashlib.md5(path.read_bytes()).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setitem(download.REMOTES, "cifar10", (download.Remote(url, "0" * 32),))
        assert "does not have the expected checksum, so it was dropped" in refusal("cifar10")
        assert not list((tmp_path / "data").rglob("*.gz"))
        monkeypatch.setitem(download.REMOTES, "cifar10", (download.Remote(url, right),))
        assert same_as_all(open_images("cifar10"))
        server.shutdown()


# ------------------------------------------------------------------------------------------------- parquet, pictures


def png(pixels):
    image = pytest.importorskip("PIL.Image", reason="the extra `images` is not installed")
    buffer = io.BytesIO()
    image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, pixels, labels, image="img", label="label", names=None, contents=None):
    arrow = pytest.importorskip("pyarrow", reason="the extra `images` is not installed")
    import pyarrow.parquet as pq

    rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents or map(png, pixels))]
    table = arrow.table({image: rows, label: [int(value) for value in labels]})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        document = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": document})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.mark.parametrize("image, label", [("img", "label"), ("image", "labels"), ("img", "fine_label")])
def test_parquet_files(tmp_path, image, label):
    """Two files of train, one of test, named as Hugging Face names them; class names from the schema."""
    parts = [batch(i, 6) for i in range(3)]
    labels = [np.arange(6) % 3] * 3
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        parquet(tmp_path / "set" / "data" / f"{name}.parquet", parts[i][0], labels[i], image, label, ["a", "b", "c"])
    found = open_images(str(tmp_path / "set"), valid=4)
    assert found.classes == ["a", "b", "c"] and found.name == "set"
    assert np.array_equal(found.images["train"], np.concatenate([parts[0][0], parts[1][0]]))
    assert np.array_equal(found.images["test"], parts[2][0])
    assert found.info()["images"] == {"train": 8, "valid": 4, "test": 6}
    assert torch.equal(found.split("valid")[0], found.images["train"][8:])
    assert torch.equal(found.split("train")[1], found.labels["train"][:8])
    assert len(found.split("train", 6)[0]) == len(found.split("valid", 6)[0]) == 6
    assert open_images(str(tmp_path / "set"), valid=3).fingerprint != found.fingerprint
    assert "12 images held out" in _error(lambda: found.split("train", 12))


def _error(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_parquet_refusals(tmp_path):
    pixels, _ = batch(0, 4)
    labels = [0, 1, 1, 0]

    def both(name, **settings):
        parquet(tmp_path / name / "train.parquet", pixels, labels)
        parquet(tmp_path / name / "test.parquet", **{"pixels": pixels, "labels": labels, **settings})
        return tmp_path / name

    assert "test.parquet, row 2: not an image, or damaged" in refusal(
        both("broken", contents=[png(pixels[0]), png(pixels[1]), b"no picture", png(pixels[3])])
    )
    small = [png(pixels[i, :, : 32 - 8 * (i == 3)]) for i in range(4)]
    message = refusal(both("sizes", contents=small))
    assert "row 3 is 32 x 24 pixels" in message and "row 0 32 x 32 pixels; expected images of one size" in message
    assert "images of test are 16 x 16 pixels, those of train 32 x 32" in refusal(
        both("other", pixels=pixels[:, :, :16, :16])
    )
    assert "image 1 has label 2; there are 2 classes" in refusal(both("label", labels=[0, 2, 0, 1], names=["x", "y"]))
    assert "image 0 has label -1" in refusal(both("negative", labels=[-1, 0, 0, 1]))
    assert "has the columns picture, label; expected one of img, image" in refusal(both("column", image="picture"))
    assert "test split is empty" in refusal(both("empty", pixels=pixels[:0], labels=[]))
    folder = both("whole")
    assert refusal(folder, classes=100) == "task.classes 100: whole has 2 classes"
    assert "task.valid 4: whole has 4 training images; expected 1 to 3" in refusal(folder, valid=4)
    (folder / "test.parquet").write_bytes(b"PAR1 no parquet")
    assert "not a parquet file of images" in refusal(folder)
    (folder / "test.parquet").unlink()
    assert "lacks its test split" in refusal(folder)


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.7, 1.4, 0.0, 1.0], "has values of type double; expected integers"),
        ([0, None, 1, 1], "lacks the label of 1 images"),
        ([0, 1, 1, 2**40], "would make 1,099,511,627,777 classes"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, values, message):
    arrow = pytest.importorskip("pyarrow", reason="the extra `images` is not installed")
    import pyarrow.parquet as pq

    rows = [{"bytes": png(image), "path": ""} for image in batch(0, 4)[0]]
    for split in ("train", "test"):
        pq.write_table(arrow.table({"img": rows, "label": values}), tmp_path / f"{split}.parquet")
    assert message in refusal(tmp_path)


def test_pictures_reach_no_other_decoder_and_keep_their_values(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="the extra `images` is not installed")
    folder = tiny.pictures(tmp_path / "mine")
    path = folder / "train" / "red" / "0.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    assert "0.png: not an image, or damaged" in refusal(folder)
    pillow.fromarray(np.full((8, 8), 300, np.uint16)).save(path)
    assert "0.png: more than 8 bits a channel" in refusal(folder)


@pytest.mark.parametrize("module, package", [("pyarrow.parquet", "pyarrow"), ("PIL.Image", "pillow")])
def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, module, package):
    pixels, labels = batch(0, 4)
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", pixels, labels)
    real = importlib.import_module

    def absent(name, *arguments):
        if name == module:
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(source.importlib, "import_module", absent)
    assert f"need {package}, which is not installed: pip install 'lmnas[images]'" in refusal(tmp_path)


def test_a_folder_of_pictures(tmp_path):
    folder = tiny.pictures(tmp_path / "mine", n_train=4, n_test=2, n_valid=1)
    found = open_images(str(folder))
    assert found.classes == ["blue", "green", "red"]
    assert found.info()["images"] == {"train": 12, "valid": 3, "test": 6} and found.size == (8, 8)
    for split, n in (("train", 4), ("valid", 1), ("test", 2)):
        pixels, labels = found.split(split)
        assert torch.bincount(labels).tolist() == [n] * 3
        # blue is the third channel, green the second, red the first
        assert torch.equal(pixels.float().mean((2, 3)).argmax(1), 2 - labels)
    assert "has a validation split of its own" in refusal(folder, valid=3)
    # a part held out at the end has all classes: the order is not that of the alphabet
    mixed = open_images(str(tiny.pictures(tmp_path / "more", n_train=12)), valid=12)
    assert len(mixed.split("valid")[1].unique()) == 3
    assert mixed.split("train")[1].diff().count_nonzero() > 4


def test_pictures_that_cannot_be_used(tmp_path):
    folder = tiny.pictures(tmp_path / "mine", n_train=3)
    (folder / "test" / "pink").mkdir()
    (folder / "test" / "red" / "0.png").rename(folder / "test" / "pink" / "0.png")
    assert "class 'pink' is not in train" in refusal(folder)
    tiny.pictures(folder, size=9, n_test=0, n_train=1)
    (folder / "test" / "pink" / "0.png").unlink()
    assert "expected images of one size" in refusal(folder)
    broken = tiny.pictures(tmp_path / "broken")
    (broken / "train" / "red" / "0.png").write_bytes(b"no picture")
    assert "0.png: not an image, or damaged" in refusal(broken)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    assert "the train split is empty" in refusal(tmp_path / "empty")
    assert "has no images: expected train/CLASS/*.png" in refusal(tmp_path)
    one = tiny.pictures(tmp_path / "one", n_train=3)
    for split in ("train", "test"):
        for colour in ("red", "blue"):
            for path in (one / split / colour).iterdir():
                path.unlink()
    assert "has one class, 'green'; expected at least two" in refusal(one)
    assert "Did you mean 'cifar10'" in refusal("cifar")


def test_pictures_for_a_trained_model(tmp_path):
    folder = tiny.pictures(tmp_path / "mine")
    pixels, labels = read_pictures(folder / "test", ["blue", "green", "red"], (8, 8))
    assert len(pixels) == 9 and torch.equal(pixels.float().mean((2, 3)).argmax(1), 2 - labels)
    assert "expected a folder" in _error(lambda: read_pictures(tmp_path / "no", ["a"], (8, 8)))
    assert "class 'blue' is unknown" in _error(lambda: read_pictures(folder / "test", ["green", "red"], (8, 8)))
    assert "are 8 x 8 pixels; the model was trained on 16 x 16" in _error(
        lambda: read_pictures(folder / "test", ["blue", "green", "red"], (16, 16))
    )


# ------------------------------------------------------------------------------------------------- shapes, statistics


def test_shapes_are_the_same_every_time_and_differ_between_splits(tmp_path, monkeypatch):
    found = open_images("shapes")
    monkeypatch.setenv("LMNAS_CACHE", str(tmp_path / "other"))
    again = open_images("shapes")
    assert found.fingerprint == again.fingerprint
    assert torch.equal(found.images["train"], again.images["train"])
    assert found.info()["images"] == {"train": 7200, "valid": 800, "test": 2000}
    train = {image.numpy().tobytes() for image in found.images["train"]}
    assert len(train) == 8000 and not any(image.numpy().tobytes() in train for image in found.images["test"])
    assert min(torch.bincount(found.labels["test"])) > 150


def test_statistics_are_those_of_the_training_split_alone(tmp_path):
    found = open_images("shapes", valid=4000)
    values = found.images["train"][:4000].double() / 255
    mean, std = found.statistics
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(std.double(), values.std((0, 2, 3), correction=0), rtol=0, atol=1e-6)


def test_a_broken_cache_is_made_anew(tmp_path):
    first = open_images("shapes")
    (path,) = (tmp_path / "cache").glob("images/*/test-images.npy")
    content = path.read_bytes()
    path.unlink()  # not written over: the first set has it mapped
    path.write_bytes(content[:1000])
    assert torch.equal(open_images("shapes").images["test"], first.images["test"])
    assert path.read_bytes() == content


def test_cifar10(shared_data, tmp_path, monkeypatch):
    """The file of each image says its class; sizes are the published ones, and 5,000 are held out, as in ENAS."""
    arrow = pytest.importorskip("pyarrow.parquet", reason="the extra `images` is not installed")
    if not (shared_data / "cifar10" / "test.parquet").is_file():
        pytest.skip("no CIFAR-10 there")
    monkeypatch.setenv("LMNAS_DATA", str(shared_data))
    found = open_images("cifar10")
    assert found.info()["images"] == {"train": 45_000, "valid": 5_000, "test": 10_000} and found.size == (32, 32)
    assert torch.bincount(found.labels["train"]).tolist() == [5000] * 10
    paths = arrow.read_table(shared_data / "cifar10" / "test.parquet").column("img").combine_chunks().field("path")
    named = [path.split("/")[1] for path in paths.to_pylist()]
    assert named == [found.classes[label] for label in found.labels["test"].tolist()]
    # widely used values of the 50,000 originals; these are JPEGs of them, and 45,000
    mean, std = found.statistics
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.003)
    torch.testing.assert_close(std, torch.tensor([0.2470, 0.2435, 0.2616]), rtol=0, atol=0.003)
