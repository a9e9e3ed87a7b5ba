"""The job files in `jobs/`: each trains on small data of its kind, on any number of ranks, and says what it lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpidl import config, data, job
from mpidl.errors import UserError
from mpidl.runtime import World
from tests.launch import ROOT

pytestmark = pytest.mark.thorough

FEW = {"batch_size": 16, "partitions": 4, "epochs": 1, "threads_per_rank": "auto", "warmup_iterations": 1}


def write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in ("ant", "bee", "cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(256, size=(36, 48, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.jpg")


def write_cifar10(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        samples = generator.integers(256, size=(7, 3073)).astype(np.uint8)
        samples[:, 0] %= 10
        samples.tofile(folder / f"{name}.bin")


def write_fashion_mnist(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = generator.integers(256, size=(33, 28, 28)).astype(np.uint8)
        header = b"\0\0\x08\3" + np.array(images.shape, ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(index % 10 for index in range(33))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1\0\0\0\x21" + labels)


def write_text(folder: Path) -> None:
    (folder / "a.txt").write_text("to be, or not to be: that is the question; " * 80)


def write_arrays(folder: Path) -> None:
    generator = np.random.default_rng(0)
    np.save(folder / "x.npy", generator.standard_normal((33, 3, 32, 32)).astype(np.float32))
    np.save(folder / "y.npy", np.arange(33) % 10)


IMAGES = {"size": 32, "convert": True}
FOUR = {"num_classes": 4, "image_size": 32}
# Job file -> what writes its data, and what makes it small.
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fashion_mnist": (write_fashion_mnist, {}),
    "vgg_fashion_mnist": (
        write_fashion_mnist,
        {"model_args": {"in_channels": 1, "image_size": 28, "width": 4, "dropout": False}},
    ),
    "vgg_cifar10": (write_cifar10, {"model_args": {"width": 4}}),
    "inception_imagenet": (
        write_images,
        {"model_args": {**FOUR, "auxiliary_heads": True}, "data_args": IMAGES, "loader_workers": 0},
    ),
    "resnet50_lars": (
        write_images,
        {"model_args": {**FOUR, "zero_init_residual": True}, "data_args": IMAGES, "loader_workers": 0},
    ),
    "gpt_text": (write_text, {}),
}


def recipe(name: str, **overrides: Any) -> config.Config:
    return config.load(ROOT / "jobs" / f"{name}.toml", overrides)


def test_every_job_file_is_tried_here_or_elsewhere() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.toml")} == {*RECIPES, "digits"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_small_data_of_its_kind(world: World, shared_tmp_path: Path, name: str) -> None:
    write, small = RECIPES[name]
    if world.rank == 0:
        write(shared_tmp_path)
    world.barrier()
    trainer, train_set, validation_set = job.build_trainer(recipe(name, **FEW, **small, data_dir=str(shared_tmp_path)))
    try:
        history = trainer.fit(train_set, validation_set, epochs=1)
    finally:
        trainer.close()
    validation = [event for event in history if event["event"] == "validation"]
    assert len(validation) == 1
    assert math.isfinite(validation[0]["loss"])
    assert 0 <= validation[0]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("data_name", "data_args"),
    [
        ("synthetic", {"shape": [3, 32, 32], "num_classes": 10, "num_samples": 33, "num_validation": 9}),
        ("x.npy,y.npy", {}),
    ],
    ids=["random samples", "memory-mapped arrays"],
)
def test_a_recipe_trains_on_other_data(
    world: World, shared_tmp_path: Path, data_name: str, data_args: dict[str, Any]
) -> None:
    if world.rank == 0:
        write_arrays(shared_tmp_path)
    world.barrier()
    where = {} if data_name == "synthetic" else {"data_dir": str(shared_tmp_path)}
    small = {"model_args": {"width": 4}, "data": data_name, "data_args": data_args, **where}
    trainer, train_set, validation_set = job.build_trainer(recipe("vgg_cifar10", **FEW, **small))
    try:
        history = trainer.fit(train_set, validation_set, epochs=1)
    finally:
        trainer.close()
    assert history[0]["samples"] == 33
    assert math.isfinite(history[0]["loss"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_its_data_names_what_to_put_where(tmp_path: Path, name: str) -> None:
    made = recipe(name, data_dir=str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"absent") as caught:
        data.load_named(made.data, made.data_dir, made.data_args)
    assert any(word in str(caught.value) for word in ("put ", "give ", "--data-dir"))


@pytest.mark.parametrize(
    ("name", "num_samples"),
    [("vgg_cifar10", 50_000), ("inception_imagenet", 1_281_167), ("resnet50_lars", 1_281_167)],
)
def test_a_recipe_s_warm_up_and_schedule_fit_the_real_data(name: str, num_samples: int) -> None:
    assert job.find_schedule(recipe(name), num_samples) is not None
