"""The built-in models and how models are named."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mpidl import models
from mpidl.errors import ConfigError, DataError


def conv(inputs: int, outputs: int, side: int, bias: bool = True) -> int:
    return inputs * outputs * side * side + (outputs if bias else 0)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


LARGE = dict.fromkeys(
    ("googlenet", "googlenet_bn", "inception_v1", "resnet50", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"), (3, 224, 224)
) | {"inception_v3": (3, 299, 299)}
IMAGES = {
    "digits_cnn": (1, 8, 8), "fashion_cnn": (1, 28, 28), "lenet5": (1, 28, 28),
    "vgg13_32": (3, 32, 32), "vgg16_32": (3, 32, 32), "vgg19_32": (3, 32, 32), **LARGE,
}  # fmt: skip
NUM_HEADS = {"googlenet": 3, "googlenet_bn": 3, "inception_v3": 2}


def heads(outputs: object) -> tuple[torch.Tensor, ...]:
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(isinstance(each, torch.Tensor) for each in found)
    return found


def test_the_table_of_this_test_has_every_model_of_images() -> None:
    assert {name for name in models.NAMES if name != "gpt"} == set(IMAGES)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("num_classes", [1, 7, 10])
def test_outputs_are_one_logit_per_class_and_head(name: str, num_classes: int) -> None:
    with torch.device("meta"):  # shapes without numbers
        model = models.build(name, num_classes=num_classes)
        images = torch.zeros(3, *IMAGES[name])
    assert model.num_classes == num_classes
    assert model.image_shape == IMAGES[name]
    assert [head.shape for head in heads(model(images))] == [(3, num_classes)] * NUM_HEADS.get(name, 1)
    assert model.eval()(images).shape == (3, num_classes)


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in LARGE])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name)
    nn.functional.cross_entropy(model(torch.rand(4, *IMAGES[name])), torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("num_classes", [2, 10])
def test_parameter_counts_are_those_of_the_layers(num_classes: int) -> None:
    digits = conv(1, 16, 3) + conv(16, 32, 3) + linear(512, 64) + linear(64, num_classes)
    lenet = conv(1, 6, 5) + conv(6, 16, 5) + linear(400, 120) + linear(120, 84) + linear(84, num_classes)
    pairs = [(1, 16), (16, 32), (32, 64)]
    fashion = sum(conv(*pair, 3, bias=False) + 2 * pair[1] for pair in pairs) + linear(576, num_classes)
    for name, expected in {"digits_cnn": digits, "lenet5": lenet, "fashion_cnn": fashion}.items():
        assert num_parameters(models.build(name, num_classes=num_classes)) == expected


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize(("name", "last"), [("vgg13_32", 2), ("vgg16_32", 3)])
def test_parameter_counts_of_vgg_are_those_of_the_layers(name: str, last: int, num_classes: int) -> None:
    widths = [3, *[64] * 2, *[128] * 2, *[256] * last, *[512] * 2 * last]
    convolutions = sum(conv(*pair, 3) + 2 * pair[1] for pair in pairwise(widths))
    classifier = linear(512, 512) + 2 * 512 + linear(512, num_classes)
    assert num_parameters(models.build(name, num_classes=num_classes)) == convolutions + classifier


def test_parameter_counts_of_inception_are_those_of_the_paper_s_table() -> None:
    # Inputs, 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pooled: Szegedy and others, table 1.
    table = """
        192 64 96 128 16 32 32 / 256 128 128 192 32 96 64 / 480 192 96 208 16 48 64 / 512 160 112 224 24 64 64 /
        512 128 128 256 24 64 64 / 512 112 144 288 32 64 64 / 528 256 160 320 32 128 128 /
        832 256 160 320 32 128 128 / 832 384 192 384 48 128 128"""
    layers = [(3, 64, 7), (64, 64, 1), (64, 192, 3)]
    for block in table.split("/"):
        inputs, one, three_in, three, five_in, five, pooled = map(int, block.split())
        layers += [(inputs, width, 1) for width in (one, three_in, five_in, pooled)]
        layers += [(three_in, three, 3), (five_in, five, 5)]
    expected = sum(conv(*layer, bias=False) + 2 * layer[1] for layer in layers) + linear(1024, 1000)
    with torch.device("meta"):
        assert num_parameters(models.build("inception_v1")) == expected


def test_parameter_counts_are_those_of_the_docstrings() -> None:
    for name in models.NAMES:
        factory = getattr(models, name, None) or type(models.build(name))
        with torch.device("meta"):
            assert f"{num_parameters(models.build(name)):,} parameters" in (factory.__doc__ or "")
    assert num_parameters(models.LeNet5()) == 61_706


def test_lenet_takes_colour_images() -> None:
    model = models.build("lenet5", in_channels=3)
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(4, 28), (4, 1, 28), (4, 1, 27, 28), (4, 28, 28, 1), (4, 3, 8, 8)])
def test_images_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model, images = models.build(name), torch.zeros(shape)
    with pytest.raises(DataError, match=rf"{name} takes images of shape \(batch, \d, .* but got .*4, .*reshape"):
        model(images)


def test_images_of_integers_are_refused() -> None:
    with pytest.raises(DataError, match=r"floating-point images but got torch\.uint8; scale"):
        models.build("lenet5")(torch.zeros((4, 1, 28, 28), dtype=torch.uint8))


def test_an_unknown_name_gets_near_names_and_all_names() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown model 'lenet'; did you mean 'lenet5' or .*\?; allowed are digits_cnn"
    ):
        models.build("lenet")


def test_an_unknown_argument_gets_the_signature_and_near_names() -> None:
    with pytest.raises(
        ConfigError, match=r"model lenet5 does not take 'classes'; it takes .*num_classes=10.*mean 'num_classes'\?"
    ):
        models.build("lenet5", classes=3)


@pytest.mark.parametrize("num_classes", [0, -1, True, "10", 2.0])
@pytest.mark.parametrize("name", IMAGES)
def test_a_wrong_number_of_classes_is_refused(name: str, num_classes: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: num_classes is .*at least 1"):
        models.build(name, num_classes=num_classes)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, "half", float("nan")])
def test_a_wrong_dropout_is_refused(dropout: object) -> None:
    with pytest.raises(ConfigError, match=r"digits_cnn: dropout is .*below 1"):
        models.build("digits_cnn", dropout=dropout)


def test_a_model_of_ones_own_is_named_by_module_and_callable() -> None:
    model = models.build("torch.nn:Linear", in_features=3, out_features=2)
    assert isinstance(model, nn.Linear)


def test_a_callable_that_makes_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"collections:OrderedDict returned a OrderedDict"):
        models.build("collections:OrderedDict")


def test_an_error_inside_ones_own_model_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="int"):
        models.build("torch.nn:Linear", in_features="three", out_features=2)
