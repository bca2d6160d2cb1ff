"""The four sources: their splits, what they read, and what they refuse."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from supernet.data import Data, DataInfo, Loader, eval_transform
from supernet.data.cifar10 import Cifar10
from supernet.data.digits import Digits
from supernet.data.fashion_mnist import FashionMnist, read_idx
from supernet.data.image_folder import ImageFolder

CONF = Path(__file__).parents[3] / "conf"
MakeImages = Callable[..., Path]


def idx(array: np.ndarray) -> bytes:
    """The IDX form, by its published description."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def make_fashion(tmp_path: Path) -> Data:
    generator = np.random.default_rng(0)
    for part, number in (("train", 41), ("t10k", 20)):
        images = generator.integers(0, 256, (number, 28, 28))
        write_fashion(tmp_path / "fashion", part, images, np.arange(number) % 10)
    return FashionMnist(folder=tmp_path / "fashion", root=tmp_path / "unused")


def make_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Files of CIFAR-10's form; their checksums stand in for the real ones."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(number: int) -> dict[str, object]:
        pixels = generator.integers(0, 256, (number, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [n % 10 for n in range(number)]}

    train = [write(f"data_batch_{n}", batch(21)) for n in (1, 2)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(10))])
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return Cifar10(root=tmp_path)


KINDS = ("digits", "fashion", "cifar", "folder", "tar", "tars", "tar_of_tars", "files")


@pytest.fixture(params=KINDS)
def data(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_images: MakeImages,
    monkeypatch: pytest.MonkeyPatch,
) -> Data:
    """Every source; their test sets exist only once `test_split` is asked for in folders."""
    if request.param == "digits":
        return Digits(img_size=8)
    if request.param == "fashion":
        return make_fashion(tmp_path)
    if request.param == "cifar":
        return make_cifar(tmp_path, monkeypatch)
    form = "folder" if request.param == "files" else request.param
    return ImageFolder(
        train=make_images("train", form),
        test=make_images("test", form, counts=(2, 3, 4)),
        img_size=12,
        in_memory=request.param != "files",
        num_workers=0,
    )


def test_halves_are_disjoint_exhaustive_and_stratified(data: Data) -> None:
    weight, architecture = data.search_splits(seed=1)
    source = weight.source
    assert architecture.source is source
    together = np.concatenate([weight.indices, architecture.indices])
    assert np.array_equal(np.sort(together), np.arange(len(source)))
    assert abs(len(weight) - len(architecture)) <= 1
    counts = [torch.bincount(half.labels, minlength=10) for half in (weight, architecture)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    for half in (weight, architecture):
        assert np.array_equal(half.indices, np.sort(half.indices))


def test_a_split_is_a_function_of_its_seed(data: Data) -> None:
    first = data.search_splits(seed=1)[0].indices
    assert np.array_equal(first, data.search_splits(seed=1)[0].indices)
    assert not np.array_equal(first, data.search_splits(seed=2)[0].indices)


def test_retraining_validates_on_training_images(data: Data) -> None:
    train, val = data.retrain_splits(seed=1, val_share=0.2)
    size = len(train.source)
    assert train.source is val.source is data.search_splits(0)[0].source
    together = np.concatenate([train.indices, val.indices])
    assert np.array_equal(np.sort(together), np.arange(size))
    assert len(val) == round(0.2 * size)
    for label, count in enumerate(torch.bincount(train.source.labels).tolist()):
        assert abs(int((val.labels == label).sum()) - 0.2 * count) <= 1
    for share in (0.0, 1.0, 1e-4):
        with pytest.raises(ValueError, match=f"val_share={share} leaves one part"):
            data.retrain_splits(seed=1, val_share=share)


def test_the_test_set_is_another_source_and_is_all_there(data: Data) -> None:
    train = data.search_splits(seed=0)[0]
    test = data.test_split()
    assert test.source is not train.source
    assert np.array_equal(test.indices, np.arange(len(test.source)))
    images = torch.cat([images for images, _ in Loader(test, batch_size=7, seed=0, train=False)])
    everything = [
        torch.cat([batch for batch, _ in Loader(half, batch_size=64, seed=0, train=False)])
        for half in data.search_splits(seed=0)
    ]
    ours = {image.numpy().tobytes() for image in torch.cat(everything)}
    # the digits hold no image twice; the tiny folders start with the same ones on purpose
    if isinstance(data, Digits):
        assert not ours & {image.numpy().tobytes() for image in images}


def test_evaluation_batches_equal_eval_transform(data: Data, image_of: Callable) -> None:
    loader = Loader(data.test_split(), batch_size=64, seed=0, train=False)
    batch = loader.batch(0, 0)[0]
    transform = eval_transform(DataInfo.from_dict(json.loads(json.dumps(data.info.to_dict()))))
    for number in (0, 3):
        if isinstance(data, ImageFolder):
            label, place = (0, 0) if number == 0 else (1, 1)  # of counts (2, 3, 4)
            image = Image.fromarray(image_of(label, place))
        else:
            image = data._read(train=False).image(number)
        assert torch.equal(transform(image), batch[number])


def test_memory_is_uint8_and_normalised_by_the_training_images(data: Data) -> None:
    info = data.info
    size = len(data.search_splits(0)[0].source)
    loader = Loader(data.retrain_splits(0, 0.5)[0], batch_size=size, seed=0, train=False)
    source = loader.split.source
    if isinstance(data, ImageFolder) and not data.in_memory:
        assert info.mean == (0.485, 0.456, 0.406)
        return
    assert source.images.dtype == torch.uint8
    assert source.images.shape == (size, info.in_chans, info.img_size, info.img_size)
    pixels = source.images.double() / 255
    for channel in range(info.in_chans):
        assert info.mean[channel] == pytest.approx(float(pixels[:, channel].mean()), abs=1e-9)
        deviation = float(pixels[:, channel].std(correction=0))
        assert info.std[channel] == pytest.approx(deviation, abs=1e-9)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_search_needs_no_test_set(make_images: MakeImages, in_memory: bool) -> None:
    data = ImageFolder(
        train=make_images("train"), test="nowhere", img_size=8, in_memory=in_memory, num_workers=0
    )
    for half in data.search_splits(0):
        list(Loader(half, batch_size=4, seed=0, train=True))
    assert data.info.class_names == ("cat", "dog", "eel")
    with pytest.raises(ValueError, match="no folder and no tar at nowhere"):
        data.test_split()


def test_fashion_reads_no_test_file_in_a_search(tmp_path: Path) -> None:
    data = make_fashion(tmp_path)
    for file in (tmp_path / "fashion").glob("t10k-*"):
        file.unlink()
    assert len(data.search_splits(0)[0]) == 21


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    data, digits = Digits(img_size=8), load_digits()
    train, test = data.search_splits(0)[0].source, data.test_split().source
    assert (len(train), len(test)) == (1437, 360)
    labels = torch.cat([train.labels, test.labels])
    assert labels.tolist() == digits.target.tolist()
    images = torch.cat([train.images, test.images])[:, 0].double() * 16 / 255
    assert np.abs(images.numpy() - digits.images).max() <= 0.5 * 16 / 255 + 1e-9
    assert Digits().info.img_size == 32


def test_limits_keep_every_class_in_proportion(make_images: MakeImages) -> None:
    folder = make_images("train", counts=(12, 6, 3))
    data = ImageFolder(train=folder, test=folder, img_size=8, train_limit=7, test_limit=14)
    source = data.search_splits(5)[0].source
    assert torch.bincount(source.labels).tolist() == [4, 2, 1]
    assert torch.bincount(data.test_split().labels).tolist() == [8, 4, 2]
    everything = ImageFolder(train=folder, test=folder, img_size=8, train_limit=99)
    assert len(everything.search_splits(0)[0].source) == 21
    with pytest.raises(ValueError, match="train_limit=2 leaves 2 of 3 classes"):
        ImageFolder(train=folder, test=folder, img_size=8, train_limit=2).search_splits(0)


def test_different_classes_are_refused(make_images: MakeImages) -> None:
    data = ImageFolder(train=make_images("a"), test=make_images("b", counts=(2, 2)), img_size=8)
    with pytest.raises(ValueError, match="3 classes and the test set 2; .*'eel'"):
        data.test_split()


def test_folders_without_classes_are_refused(tmp_path: Path, image_of: Callable) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.fromarray(image_of(0, 0)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "images.zip").write_bytes(b"")
    for name, message in (
        ("empty", "no images can be read from .*empty"),
        ("flat", "must hold one folder a class"),
        ("broken.tar", "no images can be read from .*broken.tar"),
        ("images.zip", "neither a folder nor an uncompressed .tar"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(train=tmp_path / name, test=tmp_path).search_splits(0)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_damaged_image_is_named(make_images: MakeImages, form: str) -> None:
    root = make_images("train", form)
    file = root / "dog" / "002.png" if form == "folder" else root
    content = file.read_bytes()
    file.write_bytes(content.replace(b"IDAT", b"JUNK"))
    with pytest.raises(ValueError, match=f"{file.name}.* is not a readable image"):
        ImageFolder(train=root, test=root, num_workers=0, img_size=12).search_splits(0)


def test_settings_without_effect_are_refused(make_images: MakeImages) -> None:
    root = make_images("train")
    with pytest.raises(ValueError, match="scale has no effect with in_memory=True"):
        ImageFolder(train=root, test=root, img_size=8, scale=(0.5, 1)).search_splits(0)
    with pytest.raises(ValueError, match="pad, cutout has no effect with in_memory=False"):
        ImageFolder(train=root, test=root, in_memory=False, pad=4, cutout=0).search_splits(0)
    with pytest.raises(ValueError, match="exclude each other"):
        ImageFolder(train=root, test=root, color_jitter=0.1, auto_augment="v0")
    with pytest.raises(ValueError, match="two shares of the area"):
        ImageFolder(train=root, test=root, scale=(2, 1))
    with pytest.raises(ValueError, match="in_chans=2"):
        ImageFolder(train=root, test=root, in_chans=2)
    with pytest.raises(ValueError, match="mean and std together"):
        Digits(mean=[0.5])
    with pytest.raises(ValueError, match="mean needs 1 values"):
        Digits(mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_image_files_take_any_size_and_channels(make_images: MakeImages, in_chans: int) -> None:
    root = make_images("train", size=(20, 31), suffix="jpg")
    splits = [
        ImageFolder(
            train=root,
            test=root,
            img_size=16,
            in_chans=in_chans,
            in_memory=in_memory,
            mean=[0.5] * in_chans,
            std=[0.25] * in_chans,
            num_workers=0,
            auto_augment="rand-m5" if in_chans == 1 else None,
        ).test_split()
        for in_memory in (True, False)
    ]
    held, read = (Loader(split, batch_size=9, seed=0, train=False) for split in splits)
    for (a, _), (b, _) in zip(held, read, strict=True):
        assert a.shape == (9, in_chans, 16, 16) and torch.equal(a, b)
    varied = Loader(splits[1], batch_size=9, seed=0, train=True).batch(0, 0)[0]
    assert varied.shape == (9, in_chans, 16, 16)


def test_size_decides_what_is_held_in_memory(
    make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images("train")  # 18 images
    for limit, expected in ((18 * 3 * 64, True), (18 * 3 * 64 - 1, False)):
        monkeypatch.setattr("supernet.data.image_folder.MAX_MEMORY", limit)
        data = ImageFolder(train=root, test=root, img_size=8, num_workers=0)
        assert hasattr(data.test_split().source, "images") == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_decode_into_memory_what_one_process_does(
    make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images("train", "tar")
    monkeypatch.setattr("supernet.data.sources._CHUNK", 4)
    monkeypatch.setattr("supernet.data.sources._CHUNKS_PER_WORKER", 2)
    held = [
        ImageFolder(train=root, test=root, img_size=8, in_memory=True, num_workers=num_workers)
        .test_split()
        .source.images
        for num_workers in (0, 2)
    ]
    assert torch.equal(*held) and len(held[0].unique()) > 100


def test_idx_files_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    path.write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(path), array)
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "not a readable gzip file"),
        (b"text", "not a readable gzip file"),
        (gzip.compress(idx(array)[:-1]), "is truncated"),
        (gzip.compress(idx(array)[:7]), "is truncated"),
        (gzip.compress(b"\0\0\x0d\3" + idx(array)[4:]), "not an IDX file of unsigned bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path)


def test_fashion_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_fashion(tmp_path / "f", "train", np.zeros((4, 28, 28)), np.arange(3))
    with pytest.raises(ValueError, match="do not belong together"):
        FashionMnist(folder=tmp_path / "f").search_splits(0)
    write_fashion(tmp_path / "f", "train", np.zeros((4, 28, 28)), np.arange(4) + 7)
    with pytest.raises(ValueError, match="label 10 is not in 0..9"):
        FashionMnist(folder=tmp_path / "f").search_splits(0)


def test_a_failed_download_names_folder_and_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match="CIFAR-10 is not in .*/here .*no network.*image_folder"):
        Cifar10(root=tmp_path / "here").search_splits(0)
    with pytest.raises(ValueError, match="Fashion-MNIST is not in .*/here .*dataset-fashion-m"):
        FashionMnist(folder=tmp_path / "none", root=tmp_path / "here").search_splits(0)


def test_fashion_is_read_from_where_torchvision_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: TorchvisionFashionMNIST) -> None:
        """Stands in for torchvision's: the .gz files and what it unpacks from them."""
        raw = Path(self.raw_folder)
        raw.mkdir(parents=True, exist_ok=True)
        for part in ("train", "t10k"):
            write_fashion(raw, part, np.zeros((20, 28, 28)), np.arange(20) % 10)
        for file in raw.glob("*.gz"):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))

    monkeypatch.setattr(TorchvisionFashionMNIST, "download", download)
    data = FashionMnist(folder=tmp_path / "none", root=tmp_path / "root", mean=[0.5], std=[0.5])
    assert len(data.search_splits(0)[0]) == 10 and len(data.test_split()) == 20


def test_info_survives_json_and_refuses_damage() -> None:
    info = DataInfo(2, ("a", "b"), 3, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    stored = json.loads(json.dumps(info.to_dict()))
    assert DataInfo.from_dict(stored) == info
    for change in (
        {"img_size": None},
        {"extra": 1},
        {"std": [0.1]},
        {"num_classes": 3},
        {"std": [0.0, 1.0, 1.0]},
        {"in_chans": 2},
        {"mean": ["x", 0, 0]},
    ):
        with pytest.raises(ValueError):
            DataInfo.from_dict({**stored, **change})
    for foreign in (None, [], {}):
        with pytest.raises(ValueError, match="has the fields num_classes"):
            DataInfo.from_dict(foreign)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "image_folder"])
def test_every_config_builds_its_source(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            overrides=[f"+data={name}"]
            + (["data.train=a", "data.test=b"] if name == "image_folder" else [])
        )
    data = instantiate(cfg.data)
    assert isinstance(data, Data)
    plain = type(data)(**({"train": "a", "test": "b"} if name == "image_folder" else {}))
    assert data.augment == plain.augment and data.img_size == plain.img_size  # same defaults


def test_real_images_in_tars(data_folder: Path) -> None:
    data = ImageFolder(
        train=data_folder / "cifar10-test.tar",  # the smaller one: a tenth of the time
        test=data_folder / "cifar10-test.tar",
        img_size=32,
        train_limit=200,
        num_workers=0,
    )
    weight, architecture = data.search_splits(0)
    assert data.info.num_classes == 10 and data.info.class_names[3] == "cat"
    assert torch.bincount(weight.labels).tolist() == [10] * 10
    assert len(weight) == len(architecture) == 100
    images, _ = Loader(weight, batch_size=100, seed=0, train=False).batch(0, 0)
    assert 0.7 < float(images.std()) < 1.3 and abs(float(images.mean())) < 0.3
