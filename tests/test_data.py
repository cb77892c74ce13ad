"""Loading and splitting: what comes out is what went in, and what is no use is refused in words."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pyrnode.config import DataConfig
from pyrnode.data import DatasetSamples, Samples, Splits, TensorSamples, load, sources, synthetic
from pyrnode.errors import DataError


def table(n: int = 50, d: int = 3, dtype: type = np.float64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(n, d)).astype(dtype)


def pixels(*shape: int, levels: int = 256) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, levels, size=shape).astype(np.uint8)


def everything(splits: Splits) -> Tensor:
    """All samples of a split, in one order whatever the split."""
    rows = torch.cat([p.tensor() for p in (splits.train, splits.validation, splits.test)]).flatten(1)
    return torch.stack(sorted(rows, key=lambda row: row.tolist()))


# --- splits ----------------------------------------------------------------------------------------------------------


def test_split_is_a_seeded_partition() -> None:
    x = table(200)
    splits = load(x)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (160, 20, 20)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits.test.tensor(), torch.from_numpy(x)[order[:20]])
    assert torch.equal(splits.validation.tensor(), torch.from_numpy(x)[order[20:40]])
    assert torch.equal(splits.train.tensor(), torch.from_numpy(x)[order[40:]])
    assert torch.equal(load(x).train.tensor(), splits.train.tensor())
    other = load(x, config=DataConfig(split_seed=1))
    assert not torch.equal(other.train.tensor(), splits.train.tensor())
    assert torch.equal(everything(other), everything(splits))


def test_split_is_the_same_on_every_machine() -> None:
    """The permutation that splits `digits`, written down once."""
    splits = load("digits")
    assert int(splits.test.tensor().long().sum()) == 56312
    assert splits.test.tensor()[0, 0, 2].tolist() == [0, 0, 16, 2, 2, 0, 0, 0]


def test_limit_caps_the_training_samples_after_the_split() -> None:
    full, capped = load(table(200)), load(table(200), config=DataConfig(limit=30, validation=0.2))
    assert (len(capped.train), len(capped.validation), len(capped.test)) == (30, 40, 20)
    assert torch.equal(capped.test.tensor(), full.test.tensor())
    assert torch.equal(capped.validation.tensor()[:20], full.validation.tensor())
    assert torch.equal(load(table(200), config=DataConfig(limit=30)).train.tensor(), full.train.tensor()[:30])


def test_splits_pass_through_and_names_come_from_the_config() -> None:
    splits = load(None, config=DataConfig(name="moons", samples=100))
    assert (splits.name, len(splits.train), splits.density) == ("moons", 80, synthetic.density("moons"))
    assert load(splits) is splits
    assert torch.equal(load("", config=DataConfig(name="moons", samples=100)).train.tensor(), splits.train.tensor())
    assert torch.equal(
        everything(splits), everything(load(synthetic.density("moons"), config=DataConfig(samples=100, split_seed=0)))
    )
    assert splits.event_shape == (2,)
    assert not splits.is_image


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    splits = load("digits")
    assert (splits.event_shape, splits.levels, splits.is_image) == ((1, 8, 8), 17, True)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1437, 180, 180)
    assert splits.train.tensor().dtype == torch.uint8
    expected = torch.from_numpy(load_digits().data).to(torch.uint8)
    assert torch.equal(everything(splits), torch.stack(sorted(expected, key=lambda row: row.tolist())))


def test_every_name_has_a_line() -> None:
    assert {"mnist", "fashion-mnist", "cifar10", "svhn", "digits", "two-bumps", "gas"} <= set(sources)
    assert set(synthetic.DENSITIES) <= set(sources)
    assert all(line and "\n" not in line for line in sources.values())


# --- samples ---------------------------------------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, int]]):
    """Vectors with a label, as torch data sets are; top-level, so that it can be sent to loader processes."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.values[index], index


VALUES = torch.arange(60, dtype=torch.float32).reshape(20, 3)


@pytest.mark.parametrize("samples", [TensorSamples(VALUES), DatasetSamples(Pairs(VALUES))], ids=["tensor", "dataset"])
def test_batches_follow_the_order(samples: Samples) -> None:
    order = torch.tensor([19, 0, 0, 7, 3])
    batches = list(samples.batches(order, 2))
    assert [len(b) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b.x for b in batches]), VALUES[order])
    assert torch.equal(samples.tensor(), VALUES)
    assert torch.equal(samples.take(torch.tensor([5, 2])).tensor(), VALUES[[5, 2]])
    assert list(samples.batches(torch.arange(0), 4)) == []
    with pytest.raises(DataError, match=r"0\.\.20 of 20 samples"):
        samples.batches(torch.arange(21), 4)
    with pytest.raises(DataError, match="int64"):
        samples.batches(torch.arange(3.0), 4)
    with pytest.raises(DataError, match="batch_size = 0"):
        samples.batches(order, 0)


def test_workers_give_the_same_batches_and_draw_no_random_numbers() -> None:
    samples = DatasetSamples(Pairs(VALUES)).take(torch.arange(19, -1, -1))
    order = torch.randperm(20)
    state = torch.get_rng_state()
    for _ in range(2):  # the second pass reuses the processes
        batches = samples.batches(order, 6, workers=1)
        first = next(batches)
        assert torch.equal(first.x, VALUES.flip(0)[order[:6]])
        assert torch.equal(torch.cat([b.x for b in (first, *batches)]), VALUES.flip(0)[order])
    given_up = samples.batches(order, 6, workers=1)
    next(given_up)
    expected = VALUES.flip(0)[order[:5]]
    assert torch.equal(
        torch.cat([b.x for b in samples.batches(order[:5], 2, workers=1)]), expected
    )  # beside the other pass
    del given_up
    again = torch.cat([b.x for b in samples.batches(order[:5], 2, workers=1)])  # after it
    assert torch.equal(again, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_in_workers_keep_their_kind() -> None:
    values = VALUES.clone()
    values[7, 1] = torch.nan
    samples = DatasetSamples(Pairs(values))
    with pytest.raises(DataError, match="item 7 has values that are NaN"):
        list(samples.batches(torch.arange(20), 5, workers=1))
    with pytest.raises(DataError, match="item 7 has values that are NaN"):
        samples.tensor()


def test_data_sets_that_cannot_be_sent_to_workers() -> None:
    class Local(Pairs):
        pass

    samples = DatasetSamples(Local(VALUES))
    assert torch.equal(samples.tensor(), VALUES)
    with pytest.raises(DataError, match="top level of a module, or use workers=0"):
        list(samples.batches(torch.arange(20), 5, workers=1))


def test_torch_data_sets() -> None:
    images = torch.from_numpy(pixels(40, 3, 4, 4))
    splits = load(TensorDataset(images, torch.zeros(40)))
    assert (splits.event_shape, splits.levels, len(splits.train)) == ((3, 4, 4), 256, 32)
    assert torch.equal(splits.train.tensor(), load(images).train.tensor())
    vectors = load(Pairs(torch.randn(30, 5, dtype=torch.float64)))
    assert (vectors.event_shape, vectors.levels, vectors.train.tensor().dtype) == ((5,), None, torch.float64)


class Items(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Tensor]):
    """A data set without random access."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(VALUES)


def test_items_of_data_sets() -> None:
    grey = Image.fromarray(pixels(6, 5))
    colour = Image.fromarray(pixels(6, 5, 3))
    assert DatasetSamples(Items(grey)).tensor().shape == (1, 1, 6, 5)
    assert torch.equal(
        DatasetSamples(Items((colour, 3))).tensor()[0], torch.from_numpy(pixels(6, 5, 3)).permute(2, 0, 1)
    )
    assert DatasetSamples(Items(torch.zeros(4, 4, dtype=torch.uint8))).event_shape == (1, 4, 4)
    for data, message in (
        (Items(), "is empty"),
        (Items({"image": grey}), "type dict: expected a tensor"),
        (Items(torch.zeros(2, 2, 2, 2)), r"shape \(2, 2, 2, 2\)"),
        (Items(torch.zeros(3, dtype=torch.complex64)), "complex64"),
        (Items(torch.zeros(8, 8, 3, dtype=torch.uint8)), "channels last"),
        (Items(torch.zeros(3, dtype=torch.int64)), "set levels = L"),
        (Stream(), "no random access"),
    ):
        with pytest.raises(DataError, match=message):
            DatasetSamples(data)
    with pytest.raises(DataError, match=r"item 1 is \(4,\) float32, but item 0 is \(3,\) float32"):
        DatasetSamples(Items(torch.zeros(3), torch.zeros(4))).tensor()
    with pytest.raises(DataError, match=r"values 0 \.\. 20, but levels = 17"):
        DatasetSamples(Items(torch.tensor([0, 20], dtype=torch.uint8)), levels=17)


def test_scaled_pixels_are_recognised() -> None:
    """The usual mistake: torchvision's ToTensor has divided the pixels by 255."""
    scaled = torch.from_numpy(pixels(20, 1, 4, 4)).float() / 255
    for data in (scaled, TensorDataset(scaled)):
        with pytest.raises(DataError, match="PILToTensor in place of ToTensor"):
            load(data)
    noisy = scaled + 0.001 * torch.rand(scaled.shape)
    assert (load(noisy).levels, load(noisy).event_shape) == (None, (1, 4, 4))


# --- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_tables_keep_their_type(dtype: type) -> None:
    x = table(dtype=dtype)
    for data in (x, torch.from_numpy(x), x[:, ::-1][:, ::-1], x.astype(x.dtype.newbyteorder(">"))):
        splits = load(data)
        assert splits.train.tensor().dtype == torch.from_numpy(x).dtype
        assert torch.equal(splits.train.tensor(), load(x).train.tensor())
    read_only = x.copy()
    read_only.flags.writeable = False
    assert torch.equal(load(read_only).train.tensor(), load(x).train.tensor())


def test_images() -> None:
    assert load(pixels(30, 6, 5)).event_shape == (1, 6, 5)
    splits = load(pixels(30, 3, 6, 5))
    assert (splits.event_shape, splits.levels, splits.train.tensor().dtype) == ((3, 6, 5), 256, torch.uint8)
    assert load(pixels(30, 6, 5, levels=4), config=DataConfig(levels=4)).levels == 4
    wide = pixels(30, 6, 5).astype(np.int64)
    assert load(wide, config=DataConfig(levels=256)).train.tensor().dtype == torch.uint8
    wide = load(wide * 100, config=DataConfig(levels=2**15))
    assert (wide.levels, wide.train.tensor().dtype) == (2**15, torch.int32)
    discrete = load(pixels(30, 6, levels=8).astype(np.int32), config=DataConfig(levels=8))
    assert (discrete.event_shape, discrete.levels, discrete.train.tensor().dtype) == ((6,), 8, torch.uint8)


def broken(x: np.ndarray[Any, Any], index: Any, value: float) -> np.ndarray[Any, Any]:
    x = x.copy()
    x[index] = value
    return x


BAD_ARRAYS: list[tuple[Any, dict[str, Any], str]] = [
    (np.zeros((0, 3)), {}, "is empty"),
    (np.zeros((30, 0)), {}, "is empty"),
    (table(9), {}, "9 samples; expected at least 10"),
    (np.arange(20.0), {}, r"reshape it to \(n, 1\)"),
    (np.array(3.0), {}, r"shape \(\)"),
    (np.zeros((20, 1, 1, 1, 1)), {}, r"expected \(n, d\)"),
    (broken(table(), (4, 2), np.nan), {}, "1 NaN or infinite values, the first in row 4, column 2"),
    (broken(table(), (slice(6, 9), 1), np.inf), {}, "3 NaN or infinite values, the first in row 6, column 1"),
    (broken(table(), (slice(None), 1), 2.5), {}, r"column 1 is constant \(2.5\)"),
    (broken(pixels(20, 1, 4, 4).astype(np.float64), (2, 0, 1, 1), np.nan), {}, "the first in image 2"),
    (np.array([["a", 1]] * 20, dtype=object), {}, "type object: all entries must be numbers"),
    (np.array([["a", "b"]] * 20), {}, "type <U1"),
    (np.zeros((20, 3), dtype=bool), {}, "type bool: convert it to uint8 and set levels = 2"),
    (table().astype(np.complex128), {}, "complex128"),
    (table(dtype=np.float16), {}, "float16: convert it to float32"),
    (torch.zeros(20, 3, dtype=torch.bfloat16), {}, "bfloat16: convert it to float32"),
    (torch.zeros(20, 3, device="meta"), {}, r"pass it as \.cpu\(\)"),
    (torch.eye(20).to_sparse(), {}, r"to_dense\(\)"),
    (np.arange(60).reshape(20, 3), {}, "set levels = L"),
    (pixels(20, 3), {}, "set levels = L"),
    (pixels(20, 4, 4).astype(np.int32), {}, "set levels = L"),
    (pixels(20, 8, 8, 3), {}, "channels last"),
    (pixels(20, 4, 4), {"levels": 17}, "but levels = 17 allows 0 .. 16"),
    (pixels(20, 4, 4).astype(np.int64) - 1, {"levels": 256}, "values -1 .. 254"),
    (np.random.default_rng(0).random((20, 4, 4)), {"levels": 256}, "leave levels unset"),
    (table(), {"levels": 16}, "leave levels unset"),
    (table(10), {"validation": 0.6, "test": 0.5}, "leave no training sample"),
    ([[1.0, 2.0]] * 20, {}, "cannot load a list"),
    (3, {}, "cannot load a int"),
    (None, {}, "no data"),
    ("", {}, "no data"),
]


@pytest.mark.parametrize(("data", "settings", "message"), BAD_ARRAYS, ids=[m[:32] for _, _, m in BAD_ARRAYS])
def test_bad_arrays(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(data, config=DataConfig(**settings))


def test_column_that_is_constant_in_the_training_split_alone() -> None:
    x = table(20)
    train = load(torch.arange(40.0).reshape(20, 2)).train.tensor()[:, 0].long() // 2
    x[train.numpy(), 1] = 1.0
    with pytest.raises(DataError, match=r"training split\): column 1 is constant \(1\) in all 16 samples"):
        load(x)


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(DataError, match=r"nowhere\.csv does not exist"):
        load(str(tmp_path / "nowhere.csv"))
    (tmp_path / "x.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"unknown kind of file; expected \.npy"):
        load(tmp_path / "x.txt")
    with pytest.raises(DataError, match="levels = 5 unset"):
        load("moons", config=DataConfig(levels=5))
    with pytest.raises(DataError, match=r"digits has values 0 \.\. 16, but levels = 5"):
        load("digits", config=DataConfig(levels=5))


# --- files -----------------------------------------------------------------------------------------------------------


def test_numpy_files(tmp_path: Path) -> None:
    x = table(60)
    np.save(tmp_path / "x.npy", x)
    assert torch.equal(load(tmp_path / "x.npy").train.tensor(), load(x).train.tensor())
    assert load(str(tmp_path / "x.npy")).name == "x"
    np.savez(tmp_path / "one.npz", anything=x)
    assert torch.equal(load(tmp_path / "one.npz").train.tensor(), load(x).train.tensor())
    for name in ("val", "validation"):
        np.savez_compressed(tmp_path / "three.npz", train=x[:30], test=x[45:], **{name: x[30:45]})
        splits = load(tmp_path / "three.npz")
        assert torch.equal(splits.validation.tensor(), torch.from_numpy(x[30:45]))
        assert torch.equal(splits.test.tensor(), torch.from_numpy(x[45:]))
        assert len(splits.train) == 30
    np.savez(tmp_path / "two.npz", train=x[:40], test=x[40:])
    splits = load(tmp_path / "two.npz")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 20)
    assert torch.equal(splits.test.tensor(), torch.from_numpy(x[40:]))


class Bomb:
    """Runs code if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def test_bad_numpy_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("whole.npy", table(1000))
    Path("cut.npy").write_bytes(Path("whole.npy").read_bytes()[:900])
    np.savez("whole.npz", x=table(1000))
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:900])
    Path("empty.npy").write_bytes(b"")
    Path("text.npy").write_text("1,2,3\n")
    np.save("object.npy", np.array([Bomb()] * 20, dtype=object), allow_pickle=True)
    Path("pickle.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez("names.npz", a=table(), b=table())
    np.savez("shapes.npz", train=table(20, 3), test=table(20, 4))
    for name, message in (
        ("cut.npy", "cut.npy cannot be read"),
        ("cut.npz", "cut.npz cannot be read"),
        ("empty.npy", "empty.npy cannot be read"),
        ("text.npy", "not a numpy file"),
        ("object.npy", "does not unpickle"),
        ("pickle.npy", "does not unpickle"),
        ("names.npz", "has arrays a, b: expected one, or train, test"),
        ("shapes.npz", "differ in shape"),
    ):
        with pytest.raises(DataError, match=message):
            load(name)
    assert not Path("exploded").exists()


def test_csv_with_and_without_names(tmp_path: Path) -> None:
    frame = pd.DataFrame(table(40), columns=["a", "b", "c d"])
    frame["n"] = range(40)
    named, bare = tmp_path / "named.csv", tmp_path / "bare.csv"
    frame.to_csv(named, index=False)
    frame.to_csv(bare, index=False, header=False)
    a, b = load(named), load(bare)
    assert a.features == ("a", "b", "c d", "n")
    assert b.features is None
    expected = load(frame.to_numpy()).train.tensor()
    assert expected.dtype == torch.float64
    assert torch.equal(a.train.tensor(), expected)
    assert torch.equal(b.train.tensor(), expected)
    counts = pd.DataFrame({"i": range(20), "j": [k % 3 for k in range(20)]})
    counts.to_csv(named, index=False)
    assert load(named).train.tensor().dtype == torch.float64
    discrete = load(named, config=DataConfig(levels=20))
    assert (discrete.levels, discrete.train.tensor().dtype, discrete.features) == (20, torch.uint8, ("i", "j"))


def test_parquet_and_data_frames(tmp_path: Path) -> None:
    frame = pd.DataFrame(table(40, dtype=np.float32), columns=["a", "b", "c"])
    frame.to_parquet(tmp_path / "x.parquet")
    splits = load(tmp_path / "x.parquet")
    assert (splits.name, splits.features, splits.train.tensor().dtype) == ("x", ("a", "b", "c"), torch.float32)
    assert torch.equal(splits.train.tensor(), load(frame.to_numpy()).train.tensor())
    frame["d"] = range(40)
    assert torch.equal(load(frame).train.tensor(), load(frame.to_numpy(dtype=np.float64)).train.tensor())
    nullable = frame.astype({"d": "Int64", "a": "Float64"})
    assert torch.equal(load(nullable).train.tensor(), load(frame).train.tensor())
    nullable.loc[3, "d"] = pd.NA
    with pytest.raises(DataError, match="the first in row 3, column 'd'"):
        load(nullable)


def test_bad_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = pd.DataFrame(table(30), columns=["a", "b", "c"])
    good.to_parquet("whole.parquet")
    Path("cut.parquet").write_bytes(Path("whole.parquet").read_bytes()[:500])
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("a,b\n")
    Path("ragged.csv").write_text("a,b\n" + "1,2\n" * 20 + "1,2,3\n")
    Path("binary.csv").write_bytes(bytes(range(128, 256)) * 10)
    Path("short.csv").write_text("a,b\n" + "".join(f"{i},{i + 1}\n" for i in range(20)) + "7\n")
    good.assign(word="x").to_csv("word.csv", index=False)
    good.assign(b=["?", *range(29)]).to_csv("cell.csv", index=False)
    good.to_csv("index.csv")
    good.assign(b=1.5).to_csv("constant.csv", index=False)
    for name, message in (
        ("cut.parquet", "cut.parquet cannot be read"),
        ("empty.csv", "is empty"),
        ("header.csv", "is empty: 0 rows, 2 columns"),
        ("ragged.csv", "ragged.csv cannot be read"),
        ("binary.csv", "binary.csv cannot be read"),
        ("short.csv", "the first in row 20, column 'b'"),
        ("word.csv", r"row 0, column 'word' is not a number \('x'\).*drop it"),
        ("cell.csv", r"row 0, column 'b' is not a number \('\?'\)"),
        ("index.csv", "likely a row index"),
        ("constant.csv", r"column 'b' is constant \(1.5\)"),
    ):
        with pytest.raises(DataError, match=message):
            load(name)
    for column in ([True] * 30, pd.date_range("2020", periods=30), pd.Categorical(["x"] * 30), [1j] * 30):
        with pytest.raises(DataError, match=r"column 'z' (is not a number|holds t)"):
            load(good.assign(z=column))
    with pytest.raises(DataError, match="set levels = L"):
        load(pd.DataFrame({"i": range(30)}))


# --- images ----------------------------------------------------------------------------------------------------------


def write(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_flat_folder_of_images(tmp_path: Path) -> None:
    images = pixels(20, 6, 5, 3)
    for i, image in enumerate(images):
        write(tmp_path / f"{i:02}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    write(tmp_path / ".hidden" / "x.png", pixels(9, 9))
    splits = load(tmp_path)
    assert (splits.event_shape, splits.levels, splits.name) == ((3, 6, 5), 256, tmp_path.name)
    assert torch.equal(splits.train.tensor(), load(images.transpose(0, 3, 1, 2)).train.tensor())


def test_folder_with_splits_and_classes(tmp_path: Path) -> None:
    images = pixels(30, 4, 4)
    for i, image in enumerate(images):
        part = "train" if i < 20 else "test" if i < 25 else "val"
        write(tmp_path / part / "ab"[i % 2] / f"{i:02}.png", image)
    splits = load(str(tmp_path))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 5, 5)
    expected = torch.from_numpy(images[[20, 22, 24, 21, 23]]).unsqueeze(1)  # class a, then b
    assert torch.equal(splits.test.tensor(), expected)
    assert len(load(tmp_path / "train").test) == 2


def test_large_folders_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrnode.data import images as module

    for i, image in enumerate(pixels(12, 4, 4)):
        write(tmp_path / f"{i:02}.png", image)
    in_memory = load(tmp_path)
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 0)
    on_disk = load(tmp_path)
    assert isinstance(on_disk.train, DatasetSamples)
    assert torch.equal(on_disk.train.tensor(), in_memory.train.tensor())


def test_grey_images_among_colours_are_expanded(tmp_path: Path) -> None:
    write(tmp_path / "00.png", pixels(4, 4, 3))
    for i in range(1, 12):
        write(tmp_path / f"{i:02}.png", pixels(4, 4))
    rows = everything(load(tmp_path)).reshape(-1, 3, 4, 4)
    grey = torch.from_numpy(pixels(4, 4)).expand(3, 4, 4)
    assert int((rows == grey).all(dim=3).all(dim=2).all(dim=1).sum()) == 11


def test_bad_folders_of_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        load(tmp_path)
    for i in range(12):
        write(tmp_path / f"{i:02}.png", pixels(8, 8))
    odd = tmp_path / "05.png"
    good = odd.read_bytes()
    odd.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"05\.png is not a readable image"):
        load(tmp_path)
    for image, message in (
        (pixels(8, 9), r"05\.png is \(1, 8, 9\)"),
        (pixels(8, 8, 3), "has colours, but the first image is grey"),
        (pixels(8, 8, 4), "has mode RGBA: convert it"),
    ):
        write(odd, image)
        with pytest.raises(DataError, match=message):
            load(tmp_path)
    odd.write_bytes(good)
    with pytest.raises(DataError, match="but levels = 16"):
        load(tmp_path, config=DataConfig(levels=16))
    write(tmp_path / "train" / "0.png", pixels(8, 8))
    with pytest.raises(DataError, match=r"train/ but no test/"):
        load(tmp_path)
    write(tmp_path / "test" / "0.png", pixels(4, 4))
    with pytest.raises(DataError, match=r"shape \(1, 4, 4\), but train/ of shape \(1, 8, 8\)"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "svhn"])
def test_failed_download_says_where_the_files_belong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.request

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("PYRNODE_DATA", str(tmp_path / "there"))
    (tmp_path / "there" / "cifar10-jpeg" / "train").mkdir(parents=True)  # is not taken for cifar10
    with pytest.raises(DataError, match=r"there and could not be downloaded .* PYRNODE_DATA or --data-dir"):
        load(name)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """An array in MNIST's file format."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def test_torchvision_files_are_read_and_not_written(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    train, test = pixels(40, 28, 28), pixels(8, 28, 28)
    for part, images in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.zeros(len(images), dtype=np.uint8)))
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    splits = load("mnist", config=DataConfig(dir=str(tmp_path)))
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert (splits.event_shape, splits.levels, len(splits.train), len(splits.validation)) == ((1, 28, 28), 256, 36, 4)
    assert torch.equal(splits.test.tensor()[:, 0], torch.from_numpy(test))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits.train.tensor()[:, 0], torch.from_numpy(train)[order[4:]])
    (raw / "train-images-idx3-ubyte").write_bytes(idx(train)[:5000])
    with pytest.raises(DataError, match=r"MNIST in .* cannot be read"):
        load("mnist", config=DataConfig(dir=str(tmp_path)))


def test_real_mnist(data_dir: Path) -> None:
    splits = load("mnist", config=DataConfig(dir=str(data_dir)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54_000, 6_000, 10_000)
    train = torch.cat([splits.train.tensor(), splits.validation.tensor()])
    # the moments of MNIST that everyone normalises by
    assert float(train.float().mean()) / 255 == pytest.approx(0.1307, abs=1e-4)
    assert float(train.float().std()) / 255 == pytest.approx(0.3081, abs=1e-4)


def test_real_photographs(data_dir: Path) -> None:
    splits = load(data_dir / "cifar10-jpeg", config=DataConfig(limit=100))
    assert (splits.event_shape, splits.levels) == ((3, 32, 32), 256)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 500, 1_000)
    # CIFAR10's mean colour is (0.491, 0.482, 0.447); a tenth of it, compressed, comes close
    mean = splits.test.tensor().float().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.03)


# --- MAF's tables ----------------------------------------------------------------------------------------------------


def maf(tmp_path: Path, name: str) -> Splits:
    return load(name, config=DataConfig(dir=str(tmp_path)))


def test_power(tmp_path: Path) -> None:
    (tmp_path / "power").mkdir()
    data = np.random.default_rng(1).normal(size=(1000, 8)) * 100
    np.save(tmp_path / "power" / "data.npy", data)
    splits = maf(tmp_path, "power")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (810, 90, 100)
    assert splits.event_shape == (6,)
    shuffled = data[:, [0, 2, 4, 5, 6, 7]].copy()
    np.random.RandomState(42).shuffle(shuffled)
    both = torch.cat([splits.train.tensor(), splits.validation.tensor()]).double()
    assert torch.allclose(both.mean(0), torch.zeros(6).double(), atol=1e-6)
    assert torch.allclose(both.std(0, correction=0), torch.ones(6).double(), atol=1e-6)
    # undo the scaling by a straight line: what is left is the noise, uniform with a range that depends on the column
    for part, rows in ((splits.validation, shuffled[810:900]), (splits.test, shuffled[900:])):
        for i, width in enumerate((0.001, 0.01, 1, 1, 1, 0)):
            scaled = part.tensor()[:, i].double().numpy()
            slope, offset = np.polyfit(scaled, rows[:, i], 1)
            noise = slope * scaled + offset - rows[:, i]
            assert 0.9 * width - 1e-4 < np.ptp(noise) < 1.1 * width + 1e-4


def test_miniboone(tmp_path: Path) -> None:
    (tmp_path / "miniboone").mkdir()
    data = np.random.default_rng(1).normal(2, 3, size=(1005, 43))
    np.save(tmp_path / "miniboone" / "data.npy", data)
    splits = maf(tmp_path, "miniboone")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (815, 90, 100)
    fit = data[:905]
    scaled = ((data - fit.mean(0)) / fit.std(0)).astype(np.float32)
    assert np.array_equal(splits.test.tensor().numpy(), scaled[905:])
    assert np.array_equal(splits.validation.tensor().numpy(), scaled[815:905])
    assert np.array_equal(np.sort(splits.train.tensor().numpy(), axis=0), np.sort(scaled[:815], axis=0))


def test_hepmass(tmp_path: Path) -> None:
    folder = tmp_path / "hepmass"
    folder.mkdir()
    rng = np.random.default_rng(1)

    def frame(n: int) -> pd.DataFrame:
        x = pd.DataFrame(rng.normal(size=(n, 4)), columns=["f0", "f1", "f2", "f3"])
        x["f2"] = rng.integers(0, 3, n).astype(float)  # its smallest value recurs: dropped
        return pd.concat([pd.Series(rng.integers(0, 2, n), name="label").astype(float), x], axis=1)

    train, test = frame(400), frame(200)
    train.to_csv(folder / "1000_train.csv", index=False)
    test.assign(extra=1000.0).to_csv(folder / "1000_test.csv", index=False)
    splits = maf(tmp_path, "hepmass")
    signal, held_out = (f[f.label == 1][["f0", "f1", "f3"]] for f in (train, test))
    n = int(len(signal) * 0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (len(signal) - n, n, len(held_out))
    expected = (held_out - signal.mean()) / signal.std()
    assert np.allclose(splits.test.tensor().numpy(), expected.to_numpy(), atol=1e-5)
    assert np.allclose(splits.validation.tensor().numpy(), ((signal - signal.mean()) / signal.std())[-n:], atol=1e-5)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "npy"])
def test_gas(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "gas").mkdir()
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(300, 16)), columns=[f"s{i}" for i in range(16)])
    frame["s1"] = frame["s0"] + 0.01 * frame["s2"]  # s0 and s1 are correlated by more than 0.98: the first goes
    frame["s5"] = frame["s9"] * 3 + 0.01 * frame["s4"]
    stem = tmp_path / "gas" / "ethylene_CO"
    full = pd.concat([pd.DataFrame({"Time": range(300), "Meth": 0.0, "Eth": 1.0}), frame], axis=1)
    if suffix == "npy":
        np.save(f"{stem}.npy", frame.to_numpy())
    elif suffix == "csv":
        full.to_csv(f"{stem}.csv", index=False)
    else:
        full.to_parquet(f"{stem}.parquet")
    splits = maf(tmp_path, "gas")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (243, 27, 30)
    kept = frame.drop(columns=["s0", "s5"])
    expected = ((kept - kept.mean()) / kept.std()).to_numpy()
    assert np.allclose(splits.test.tensor().numpy(), expected[270:], atol=1e-5)
    assert np.allclose(splits.validation.tensor().numpy(), expected[243:270], atol=1e-5)


def test_gas_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"pandas\.read_pickle\(.*to_parquet"):
        maf(tmp_path, "gas")
    assert not Path("exploded").exists()


def test_bsds300(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "BSDS300").mkdir()
    x = table(100, 63, np.float32)
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        file["train"], file["validation"], file["test"] = x[:60], x[60:80], x[80:]
    splits = maf(tmp_path, "bsds300")
    assert np.array_equal(splits.test.tensor().numpy(), x[80:])
    assert (len(splits.train), len(splits.validation), splits.event_shape) == (60, 20, (63,))


def test_bsds300_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "BSDS300").mkdir()
    (tmp_path / "BSDS300" / "BSDS300.hdf5").write_bytes(b"")
    with pytest.raises(DataError, match="pip install h5py"):
        maf(tmp_path, "bsds300")


@pytest.mark.parametrize("name", ["power", "gas", "hepmass", "miniboone", "bsds300"])
def test_missing_tables_say_where_they_belong(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist: get MAF's data .* PYRNODE_DATA or --data-dir"):
        maf(tmp_path, name)


def test_wrong_tables(tmp_path: Path) -> None:
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power" / "data.npy", table(100, 7))
    with pytest.raises(DataError, match="MAF's file has 8 columns"):
        maf(tmp_path, "power")
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", table(9, 43))
    with pytest.raises(DataError, match="too few"):
        maf(tmp_path, "miniboone")
    np.save(tmp_path / "miniboone" / "data.npy", table(500, 43))
    with pytest.raises(DataError, match="levels = 4"):
        load("miniboone", config=DataConfig(dir=str(tmp_path), levels=4))
