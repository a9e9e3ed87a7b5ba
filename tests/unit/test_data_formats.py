"""CIFAR-10's files, image folders, text, random samples, and images that are moved and mirrored."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mpidl import models
from mpidl.data import ImageSource, Loader, ReadError, bigram_entropy, check_labels, load_named
from mpidl.errors import ConfigError, DataError, UserError

# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def write_cifar10(folder: Path, *, samples: int = 3, label: int = 9) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        content = generator.integers(256, size=(samples, 3073)).astype(np.uint8)
        content[:, 0] = label
        content.tofile(folder / f"{name}.bin")


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_plane_by_plane_and_normalised(tmp_path: Path, inner: str) -> None:
    write_cifar10(tmp_path / inner)
    train, validation = load_named("cifar10", str(tmp_path))
    assert (len(train), len(validation)) == (15, 3)
    images, labels = train.read(np.array([3, 0]))
    raw = np.fromfile(tmp_path / inner / "data_batch_2.bin", np.uint8)[1:3073].reshape(3, 32, 32) / 255.0
    mean, deviation = (np.array(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    assert np.allclose(images[0], (raw - mean) / deviation, rtol=1e-5, atol=1e-5)
    assert (images.dtype, labels.tolist()) == (torch.float32, [9, 9])


def test_what_is_wrong_with_cifar10_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs its folder; unpack cifar-10-binary\.tar\.gz .*--data-dir"):
        load_named("cifar10")
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4\.bin; unpack"):
        load_named("cifar10", str(tmp_path))
    (tmp_path / "data_batch_4.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_4\.bin has 3072 bytes, which is no multiple .* 3073"):
        load_named("cifar10", str(tmp_path))
    write_cifar10(tmp_path, label=10)
    with pytest.raises(DataError, match=r"data_batch_1\.bin: sample 0 has label 10"):
        load_named("cifar10", str(tmp_path))


# --- moving and mirroring ---------------------------------------------------------------------------------------------


def test_every_move_and_mirror_image_comes_up_and_nothing_else() -> None:
    pixels = np.arange(1, 26, dtype=np.uint8).reshape(1, 5, 5)
    source = ImageSource(pixels, np.zeros(1, np.int64), 0.0, 1 / 255, shift=1)
    padded = np.pad(pixels[0], 1)
    expected = {
        np.ascontiguousarray((padded[:, ::-1] if mirrored else padded)[down : down + 5, right : right + 5]).tobytes()
        for down in range(3) for right in range(3) for mirrored in (False, True)
    }  # fmt: skip
    seeds = np.random.default_rng(0).integers(2**63, size=500).tolist()
    found = {source.read(np.array([0]), [seed])[0].numpy().astype(np.uint8).tobytes() for seed in seeds}
    assert found == expected
    assert np.array_equal(source.read(np.array([0]))[0].numpy()[0], pixels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_is_moved_by_seed_epoch_and_index_only(num_workers: int) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8)).astype(np.uint8)
    source = ImageSource(pixels, np.arange(6), 0.5, 0.5, shift=2)
    expected, _ = source.read(np.arange(6), order_seeds(epoch=1))
    with Loader(source, seed=3, num_workers=num_workers, shuffle=False) as loader:
        loader.request(1, 4, 6)
        loader.request(1, 0, 4)
        assert torch.equal(loader.next()[0], expected[4:])
        assert torch.equal(loader.next()[0], expected[:4])


def order_seeds(epoch: int) -> list[int]:
    from mpidl.data import sample_seed

    return [sample_seed(3, epoch, index) for index in range(6)]


# --- image folders ----------------------------------------------------------------------------------------------------


def write_images(folder: Path, size: tuple[int, int] = (40, 30)) -> Path:
    """Two classes of two images each for training and one for validation; each of one colour."""
    for part, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("ant", "bee")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (200 * number, 100 * index, 50)
                Image.new("RGB", size, colour).save(folder / part / name / f"{index}.png")
    (folder / "train" / "ant" / "README").write_text("no image")
    return folder


def test_images_are_labelled_by_folder_cut_and_normalised(tmp_path: Path) -> None:
    train, validation = load_named("images", str(write_images(tmp_path)), {"size": 16})
    assert (train.classes, train.targets.tolist(), validation.targets.tolist()) == (
        ("ant", "bee"),
        [0, 0, 1, 1],
        [0, 1],
    )
    images, labels = train.read(np.array([3, 0]), [1, 2])
    assert (images.shape, images.dtype, labels.tolist()) == ((2, 3, 16, 16), torch.float32, [1, 0])
    expected = (np.array([200, 100, 50]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(images[0], expected[:, None, None], atol=1e-5)
    assert images.is_contiguous()


def test_validation_takes_the_middle_and_training_parts_that_follow_from_the_seed(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:56, 0:112].astype(np.uint8)
    write_images(tmp_path)
    for part in ("train", "val"):
        Image.fromarray(np.stack([rows, columns, rows], axis=2)).save(tmp_path / part / "ant" / "0.png")
    train, validation = load_named("images", str(tmp_path), {"size": 49, "resize": 56})
    middle = validation.read(np.array([0]))[0][0, :2].numpy()
    mean, deviation = (np.array(v)[:, None, None] for v in ((0.485, 0.456), (0.229, 0.224)))
    found = (middle * deviation + mean) * 255
    assert np.allclose(found[0], np.arange(49)[:, None] + 3.5, atol=0.51)  # 49 of 56 rows
    assert np.allclose(found[1], np.arange(49) + 31.5, atol=0.51)  # 49 of 112 columns
    parts = [train.read(np.array([0]), [seed])[0] for seed in (1, 2, 1)]
    assert torch.equal(parts[0], parts[2])
    assert not torch.equal(parts[0], parts[1])
    still, _ = load_named("images", str(tmp_path), {"size": 49, "resize": 56, "augment": False})
    assert np.array_equal(still.read(np.array([0]), [1])[0][0, :2].numpy(), middle)


def test_workers_read_the_images_that_the_process_itself_reads(tmp_path: Path) -> None:
    train, _ = load_named("images", str(write_images(tmp_path, (9, 300))), {"size": 8})
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "train" / "ant" / "1.png")
    batches = []
    for num_workers in (0, 1):
        with Loader(train, seed=5, num_workers=num_workers, shuffle=True) as loader:
            loader.request(0, 0, 4)
            batches.append(loader.next())
    assert torch.equal(batches[0][0], batches[1][0])
    assert batches[0][1].tolist() == batches[1][1].tolist()


def test_an_image_that_does_not_decode_is_named_or_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (write_images(tmp_path) / "train" / "bee" / "1.png").read_bytes()
    (tmp_path / "train" / "bee" / "1.png").write_bytes(whole[:60])
    train, _ = load_named("images", str(tmp_path), {"size": 8})
    with pytest.raises(ReadError, match=r"bee/1\.png cannot be decoded: .*skip_damaged = true") as caught:
        train.read(np.array([0, 3]), [0, 0])
    assert caught.value.index == 3
    assert isinstance(caught.value, UserError), "the file is to blame: a message, no traceback"
    arrived = pickle.loads(pickle.dumps(caught.value))  # as from a worker
    assert (type(arrived), str(arrived), arrived.index) == (type(caught.value), str(caught.value), 3)
    train, _ = load_named("images", str(tmp_path), {"size": 8, "skip_damaged": True})
    images, labels = train.read(np.array([2, 3]), [0, 0])
    assert (train.num_skipped, labels.tolist()) == (1, [1, 0])  # the first image stands in for the last
    assert images.isfinite().all()
    assert "1.png, which cannot be decoded" in capsys.readouterr().err
    (tmp_path / "train" / "ant" / "0.png").unlink()
    with pytest.raises(ReadError, match=r"ant/0\.png cannot be read: .*No such file"):
        train.read(np.array([0]), [0])


def test_a_grey_image_among_coloured_ones_is_named_or_converted(tmp_path: Path) -> None:
    Image.new("L", (20, 20), 255).save(write_images(tmp_path) / "train" / "ant" / "1.png")
    train, _ = load_named("images", str(tmp_path), {"size": 8})
    with pytest.raises(ReadError, match=r"ant/1\.png is of Pillow's mode L, .* mode RGB; .*convert = true"):
        train.read(np.array([1]), [0])
    train, _ = load_named("images", str(tmp_path), {"size": 8, "convert": True})
    assert train.read(np.array([1]), [0])[0].shape == (1, 3, 8, 8)
    train, _ = load_named("images", str(tmp_path), {"size": 8, "convert": True, "grey": True})
    assert train.read(np.array([1, 0]), [0, 0])[0].shape == (2, 1, 8, 8)


@pytest.mark.parametrize("convert", [False, True])
def test_an_image_of_16_bits_is_never_cut_to_8(tmp_path: Path, convert: bool) -> None:
    deep = np.full((20, 20), 3000, np.uint16)
    Image.fromarray(deep).save(write_images(tmp_path) / "train" / "ant" / "1.png")
    train, _ = load_named("images", str(tmp_path), {"size": 8, "convert": convert})
    with pytest.raises(ReadError, match=r"ant/1\.png is of Pillow's mode I;16, with more than 8 bits .*save it with 8"):
        train.read(np.array([1]), [0])


def test_folders_that_are_missing_empty_or_unknown_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images needs the folder .*--data-dir"):
        load_named("images")
    with pytest.raises(DataError, match=r"train does not exist; put the training images into .*train/CLASS/"):
        load_named("images", str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train has no folders"):
        load_named("images", str(tmp_path))
    write_images(tmp_path / "whole")
    (tmp_path / "whole" / "val" / "cat").mkdir()
    with pytest.raises(DataError, match="val has the folder cat, a class that the training set does not have"):
        load_named("images", str(tmp_path / "whole"))
    (tmp_path / "whole" / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat holds no image \(\.bmp, .*put some there or remove it"):
        load_named("images", str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": 0}, "images: size is 0; give an integer of at least 1"),
        ({"size": 32, "resize": 31}, "resize is 31; give an integer of at least size, 32"),
        ({"grey": "yes"}, "images: grey is 'yes'; give true or false"),
        ({"sizes": 3}, r"data images does not take 'sizes'; it takes .*size=224.*; did you mean 'size' or"),
    ],
)
def test_wrong_arguments_for_images_are_refused(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_named("images", str(tmp_path), args)


def test_without_pillow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"Pillow, which is not installed: pip install pillow"):
        load_named("images", str(tmp_path))


# --- random samples ---------------------------------------------------------------------------------------------------


def test_random_samples_are_functions_of_seed_and_index() -> None:
    args = {"shape": [3, 8, 8], "num_classes": 7, "num_samples": 5000, "num_validation": 10}
    train, validation = load_named("synthetic", data_args=args)
    assert (len(train), len(validation)) == (5000, 10)
    images, labels = train.read(np.array([4999, 3]))
    again, _ = load_named("synthetic", data_args=args)
    assert torch.equal(again.read(np.array([3]))[0][0], images[1])
    other, _ = load_named("synthetic", data_args=args | {"seed": 1})
    assert not torch.equal(other.read(np.array([3]))[0][0], images[1])
    assert (images.shape, images.dtype, labels.tolist()) == (
        (2, 3, 8, 8),
        torch.float32,
        train.targets[[4999, 3]].tolist(),
    )
    everything = train.read(np.arange(5000))[0]
    assert abs(float(everything.mean())) < 0.02
    assert abs(float(everything.std()) - 1) < 0.02
    assert np.bincount(train.targets, minlength=7).min() > 600
    check_labels(train, 7)


def test_samples_that_look_alike_have_the_same_label() -> None:
    train, _ = load_named("synthetic", data_args={"shape": [4], "num_classes": 5, "num_samples": 40_000})
    samples, labels = train.read(np.arange(40_000))
    by_sample: dict[bytes, set[int]] = {}
    for sample, label in zip(samples.numpy(), labels.tolist(), strict=True):
        by_sample.setdefault(sample.tobytes(), set()).add(label)
    assert len(by_sample) < 20_000
    assert all(len(found) == 1 for found in by_sample.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"shape": []}, r"shape is \[\]; give a list of integers"),
        ({"shape": 3}, "shape is 3;"),
        ({"num_classes": 0}, "num_classes is 0; give an integer of at least 1"),
        ({"num_samples": 1.5}, "num_samples is 1.5"),
    ],
)
def test_wrong_arguments_for_random_samples_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"synthetic: {message}"):
        load_named("synthetic", data_args=args)


# --- text -------------------------------------------------------------------------------------------------------------


def test_windows_of_text_lie_side_by_side_and_targets_one_further(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(bytes(range(60, 100)))
    (tmp_path / "a.txt").write_bytes(bytes(range(60)))
    train, validation = load_named("text", str(tmp_path), {"context": 8, "held_out": 0.2})
    assert (len(train), len(validation)) == (9, 2)  # of 80 and 20 bytes, one of which is only a target
    inputs, targets = train.read(np.array([8, 0]))
    assert inputs.tolist() == [list(range(64, 72)), list(range(8))]
    assert targets.tolist() == [list(range(65, 73)), list(range(1, 9))]
    assert inputs.dtype == targets.dtype == torch.int64
    assert validation.read(np.array([1]))[0].tolist() == [list(range(88, 96))]
    whole, nothing = load_named("text", str(tmp_path / "a.txt"), {"held_out": 0, "context": 59})
    assert (len(whole), len(whole.targets), nothing) == (1, 60, None)


def test_the_vocabulary_is_that_of_the_training_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("bäb∀" * 10 + "xb∀xb", encoding="utf-8")
    train, validation = load_named("text", str(tmp_path), {"context": 2, "held_out": 5 / 45, "tokens": "characters"})
    assert train.vocabulary == validation.vocabulary == "bä∀"
    assert train.targets[:4].tolist() == [0, 1, 0, 2]
    assert validation.targets.tolist() == [3, 0, 2, 3, 0]  # 3: not in the vocabulary
    check_labels(validation, 4)
    with pytest.raises(DataError, match="has label 3; with 3 classes"):
        check_labels(validation, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"context": 50}, DataError, "the training part of .* has 45 bytes, and one sample takes 51"),
        ({"context": 8}, DataError, "the held-out part of .* has 5 bytes, and one sample takes 9"),
        ({"files": "*.md"}, DataError, r"has no file that matches '\*\.md'"),
        ({"files": "/x"}, ConfigError, "files is '/x', which is no pattern"),
        ({"tokens": "words"}, ConfigError, "tokens is 'words'; give bytes or characters"),
        ({"tokens": "characters"}, DataError, r"a\.txt is not UTF-8 text \(invalid start byte at byte 9\)"),
        ({"context": 0}, ConfigError, "context is 0"),
        ({"held_out": 1}, ConfigError, "held_out is 1;"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(
    tmp_path: Path, args: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(b"123456789\xff" * 5)
    with pytest.raises(error, match=message):
        load_named("text", str(tmp_path), args)


def test_a_text_has_to_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text needs a file or folder of texts; give it with --data-dir"):
        load_named("text")
    with pytest.raises(DataError, match=r"none does not exist; give a text file or a folder"):
        load_named("text", str(tmp_path / "none"))


def test_the_entropy_of_pairs_is_that_of_the_chain_they_came_from() -> None:
    generator = np.random.default_rng(0)
    chain = np.zeros(200_000, np.uint8)  # stays with 3/4, else goes on to the next of four
    for index, moves in enumerate(generator.random(len(chain) - 1) < 0.25):
        chain[index + 1] = (chain[index] + moves) % 4
    assert bigram_entropy(chain) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=0.01)
    assert bigram_entropy(np.array([0, 1] * 10)) == pytest.approx(0, abs=1e-12)


def test_a_gpt_learns_more_of_a_text_than_pairs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 5)) + " " for _ in range(12)]
    (tmp_path / "text").write_text("".join(generator.choice(words, 4000)))
    train, held_out = load_named("text", str(tmp_path), {"context": 24, "tokens": "characters"})
    torch.manual_seed(0)
    model = models.build("gpt", vocab_size=10, context=24, width=32, layers=2, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        inputs, targets = train.read(generator.integers(len(train), size=32))
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = held_out.read(np.arange(len(held_out)))
    with torch.no_grad():
        loss = float(functional.cross_entropy(model(inputs), targets))
    assert loss < bigram_entropy(held_out.targets)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_go_to_what_the_name_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sized_data.py").write_text("def make(n=1): return [(i, i) for i in range(n)]\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_named("sized_data:make", data_args={"n": 3})[0]) == 3
    with pytest.raises(ConfigError, match=r"data sized_data:make does not take 'm'; it takes \(n=1\)$"):
        load_named("sized_data:make", data_args={"m": 3})
    sys.modules.pop("sized_data")
    with pytest.raises(ConfigError, match=r"data_args has n, but x\.npz takes none"):
        load_named("x.npz", data_args={"n": 3})
    with pytest.raises(ConfigError, match="digits takes no data_dir, but one was given, here"):
        load_named("digits", "here")
