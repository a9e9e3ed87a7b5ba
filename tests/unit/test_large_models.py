"""The models of the papers: sizes, names of parameters, auxiliary heads, and the GPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpidl import job, losses, metrics, models
from mpidl.config import Config
from mpidl.errors import ConfigError, DataError

# From the papers and from torchvision's model pages.
NUM_PARAMETERS = {
    "vgg16": 138_357_544, "vgg16_bn": 138_365_992, "vgg19": 143_667_240, "vgg19_bn": 143_678_248,
    "googlenet": 13_378_280, "googlenet_bn": 13_004_888, "inception_v3": 27_161_264, "resnet50": 25_557_032,
}  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "googlenet": {"image_size": 32},
    "googlenet_bn": {"image_size": 32},
    "inception_v1": {"image_size": 32},
    "inception_v3": {"image_size": 75, "auxiliary_head": False},
    "resnet50": {"image_size": 32},
    "vgg16_32": {"image_size": 28, "in_channels": 1, "width": 8, "batch_norm": False, "dropout": False},
}


def on_meta(name: str, **args: Any) -> nn.Module:
    """A model without numbers: made at once, however large."""
    with torch.device("meta"):
        return models.build(name, **args)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def torchvision_layers() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by model and name in the state_dict, from the file beside this test."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in Path(__file__).with_name("torchvision_layers.txt").read_text().splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = entries = {}
        elif not line.startswith("#"):
            name, kind, sizes = line.split()
            shape = tuple(map(int, sizes.split("x")))
            entries[f"{name}.weight"] = shape
            if kind != "conv":
                entries[f"{name}.bias"] = shape[:1]
            if kind == "norm":
                entries |= {f"{name}.running_mean": shape, f"{name}.running_var": shape}
                entries[f"{name}.num_batches_tracked"] = ()
    return found


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert num_parameters(on_meta(name)) == NUM_PARAMETERS[name]


def test_heads_can_be_left_out() -> None:
    assert num_parameters(on_meta("googlenet", auxiliary_heads=False)) == 6_998_552
    assert num_parameters(on_meta("googlenet_bn", auxiliary_heads=False)) == 6_624_904
    assert num_parameters(on_meta("inception_v3", auxiliary_head=False)) == 23_834_568


@pytest.mark.parametrize("name", torchvision_layers())
def test_parameters_are_named_and_shaped_as_torchvision_s(name: str) -> None:
    ours = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert ours == torchvision_layers()[name]


def test_every_model_of_torchvision_s_is_compared() -> None:
    assert set(torchvision_layers()) == set(NUM_PARAMETERS) - {"googlenet"}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, num_classes=5, **SMALL[name])
    images = torch.randn(3, *model.image_shape)  # type: ignore[misc]
    losses.WithAuxiliary(functional.cross_entropy)(model(images), torch.tensor([0, 2, 4])).backward()
    lacking = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not lacking


def test_the_paper_s_windows_are_used_for_its_images_only() -> None:
    heads = [on_meta("googlenet", image_size=size).get_submodule("aux1.pool") for size in (224, 192)]
    assert [type(head) for head in heads] == [nn.AvgPool2d, nn.AdaptiveAvgPool2d]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("inception_v3", {"image_size": 298}, "image_size is 298; give an integer of at least 299"),
        ("inception_v3", {"image_size": 74, "auxiliary_head": False}, "at least 75"),
        ("resnet50", {"image_size": 31}, "resnet50: image_size is 31; give an integer of at least 32"),
        ("vgg16", {"dropout": 1}, "vgg16: dropout is 1;"),
        ("googlenet", {"auxiliary_heads": 1}, "googlenet: auxiliary_heads is 1; give true or false"),
        ("vgg16_32", {"width": 0}, "vgg16_32: width is 0"),
        ("gpt", {"width": 30, "heads": 4}, "4 heads do not divide the width 30"),
        ("gpt", {"context": 0}, "gpt: context is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_meta(name, **args)


def test_the_smallest_images_go_through_inception() -> None:
    with torch.device("meta"):
        assert on_meta("inception_v3", **SMALL["inception_v3"])(torch.zeros(2, 3, 75, 75)).shape == (2, 1000)


def test_a_small_vgg_comes_down_to_one_point_from_28_pixels() -> None:
    model = on_meta("vgg13_32", image_size=28, in_channels=1, width=16)
    assert num_parameters(model) == num_parameters(on_meta("vgg13_32", in_channels=1, width=16))
    with torch.device("meta"):
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# --- the loss of several heads ----------------------------------------------------------------------------------------


def test_auxiliary_heads_count_by_their_weight_while_training_only() -> None:
    outputs, targets = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2])
    main, first, second = (functional.cross_entropy(head, targets) for head in outputs)
    loss = losses.WithAuxiliary(functional.cross_entropy, 0.25)
    torch.testing.assert_close(loss(tuple(outputs), targets), main + 0.25 * (first + second))
    assert loss(outputs[0], targets) == main


def test_a_loss_that_returns_sum_and_weight_keeps_its_weight() -> None:
    loss = losses.WithAuxiliary(lambda outputs, targets: (outputs.sum(), 7.0))
    total, weight = loss((torch.ones(2), torch.ones(3)), None)
    assert float(total) == pytest.approx(2.9)
    assert weight == 7.0


def test_a_job_weighs_the_heads_of_the_model_that_it_names() -> None:
    args: dict[str, Any] = {"shape": [3, 32, 32], "num_classes": 4, "num_samples": 8}
    config = Config(
        model="googlenet", model_args={"num_classes": 4, "image_size": 32}, data="synthetic", data_args=args
    )
    parts = job.prepare(config)
    images, labels = parts.train_set.read(torch.arange(4).numpy())
    outputs = parts.model(images)
    expected = [functional.cross_entropy(head, labels) for head in outputs]
    torch.testing.assert_close(parts.loss(outputs, labels), expected[0] + 0.3 * expected[1] + 0.3 * expected[2])
    assert parts.loss(outputs[0], labels) == expected[0]


# --- GPT --------------------------------------------------------------------------------------------------------------


def test_the_gpt_has_as_many_parameters_as_gpt_2() -> None:
    assert (
        num_parameters(on_meta("gpt", vocab_size=50_257, context=1024, width=768, layers=12, heads=12)) == 124_439_808
    )


def test_the_gpt_looks_back_only() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", vocab_size=11, context=8, width=16, layers=2, heads=2)
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    logits, others = model(tokens), model(changed)
    assert logits.shape == (2, 11, 8)
    torch.testing.assert_close(logits[..., :5], others[..., :5])
    assert not torch.allclose(logits[..., 5], others[..., 5])
    torch.testing.assert_close(model(tokens[:, :3]), logits[..., :3])


def test_the_gpt_begins_with_a_loss_near_that_of_chance() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", vocab_size=64, context=16)
    loss = functional.cross_entropy(model(torch.randint(64, (4, 16))), torch.randint(64, (4, 16)))
    assert abs(float(loss.detach()) - 4.1589) < 0.1  # ln 64


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.int64), r"\(batch, at most 8\) but got \(2, 9\); give .* the same context"),
        (torch.zeros(8, dtype=torch.int64), r"got \(8,\)"),
        (torch.zeros(2, 8), "int64 or int32 but got torch.float32"),
    ],
)
def test_what_are_no_tokens_is_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        models.build("gpt", context=8, width=8, layers=1, heads=1)(tokens)


def test_a_sample_of_several_labels_counts_by_the_share_that_is_right() -> None:
    targets = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    outputs = functional.one_hot(torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1]]), 4).transpose(1, 2)
    assert float(metrics.accuracy(outputs, targets)) == 0.75 + 0.25
    assert float(metrics.accuracy(outputs[..., 0], targets[:, 0])) == 2
