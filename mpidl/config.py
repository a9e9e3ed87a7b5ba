"""The run's configuration: one frozen dataclass, read from defaults, a TOML file and the command line.

Each field is declared once: its annotation is the type that is checked, its help text what `--help` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from mpidl.errors import ConfigError

CONFIG_FILE = "config.toml"
"""The resolved configuration in a run directory."""
FINISHED = "FINISHED"
"""The file in a run directory that says that there is nothing left to do: job scripts look for it."""

MODELS = (
    "digits_cnn", "fashion_cnn", "googlenet", "googlenet_bn", "gpt", "inception_v1", "inception_v3", "lenet5",
    "resnet50", "vgg13_32", "vgg16", "vgg16_32", "vgg16_bn", "vgg19", "vgg19_32", "vgg19_bn",
)  # fmt: skip
"""What `mpidl.models` has; known here so that help and completion need no torch."""
DATA = ("cifar10", "digits", "fashion_mnist", "images", "synthetic", "text")
"""What `mpidl.data` has."""
LOSSES = (
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss",
)  # fmt: skip
OPTIMIZERS = (
    "sgd", "adam", "adamw", "adamax", "nadam", "radam", "adagrad", "adadelta", "rmsprop", "rprop", "asgd",
    "lars", "lamb",
)  # fmt: skip
LAYER_WISE = ("lars", "lamb")
"""Those of them that leave biases and normalisation layers out: neither adapted nor decayed."""

# Ranks may differ in these without the run's numbers depending on it.
_LOCAL_FIELDS = ("data_dir", "run_dir", "loader_workers", "progress")

_NONE = "none"
"""What a flag takes back a setting with that need not be there, such as one of the run that is resumed."""

_TYPE_NAMES = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false",
    dict: "a table such as {key = 0.9}",
}  # fmt: skip


def described(
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    names: tuple[str, ...] = (),
    known: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A field's metadata.

    Args:
        help: what the field is, for `--help`.
        minimum: smallest number allowed.
        maximum: largest number allowed.
        names: the built-in names; anything else must then look like `package.module:callable`.
        known: built-in names that are not checked here.
    """
    return {"help": help, "minimum": minimum, "maximum": maximum, "names": names, "known": known}


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field of `Config` with its default; `limits` are those of `described`."""
    return dataclasses.field(default=default, metadata=described(help, **limits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a training run; checked when it is made.

    Raises:
        ConfigError: a value has the wrong type, is out of its range, or two values do not fit each other.
    """

    model: str = setting("digits_cnn", f"network: {', '.join(MODELS)}, or package.module:callable", known=MODELS)
    model_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=described("arguments for the model's callable")
    )
    data: str = setting(
        "digits", f"data: {', '.join(DATA)}, FILE.npz, X.npy,Y.npy, or package.module:callable", known=DATA
    )
    data_dir: str | None = setting(None, "folder that holds the data set's files")
    data_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=described("arguments for the data's callable, such as {augment = true}")
    )
    loss: str = setting(
        "cross_entropy",
        f"loss: {', '.join(LOSSES)}, or package.module:callable",
        names=LOSSES,
    )
    optimizer: str = setting("sgd", f"optimizer: {', '.join(OPTIMIZERS)}, or package.module:callable", names=OPTIMIZERS)
    lr: float = setting(0.1, "learning rate after the warm-up", minimum=0)
    optimizer_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=described("further optimizer arguments, such as {momentum = 0.9}")
    )
    schedule: Literal["constant", "step", "multistep", "poly", "exponential", "cosine", "plateau"] = setting(
        "constant",
        "learning rate after the warm-up: stays; falls after epochs; along a power, exponential or half cosine; or "
        "where validations do not get better",
    )
    schedule_args: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=described(
            "the schedule's arguments, as torch's but in epochs: step {step_size, gamma}, multistep {milestones, "
            "gamma}, poly {power}, exponential {gamma} per epoch, cosine {eta_min}, plateau {metric, mode, factor, "
            "patience, threshold, threshold_mode, cooldown, min_lr, eps}"
        ),
    )
    warmup_iterations: int = setting(0, "iterations in which the learning rate rises linearly to lr", minimum=0)
    epochs: int = setting(10, "passes over the training data", minimum=1)
    batch_size: int = setting(64, "samples of one iteration, over all ranks", minimum=1)
    partitions: int = setting(8, "pieces of every batch; the result depends on this, never on the ranks", minimum=1)
    group_size: int | Literal["auto"] = setting(
        "auto", "iterations that one broadcast plans; auto: so many that plans and reports take 1 to 5 % of the time",
        minimum=1,
    )  # fmt: skip
    max_group_seconds: float = setting(
        2.0, "the longest time that group_size auto lets a group take; balance acts at a group's end", minimum=0
    )
    reduction: Literal["ordered", "mpi", "driver", "tree", "allreduce"] = setting(
        "ordered",
        "gradient sum: in a fixed order (same bits everywhere), or the MPI library's own; or what these are measured "
        "against: all to rank 0, in a tree to rank 0, or to everyone with a whole optimizer each",
    )
    wire: Literal["float32", "bfloat16"] = setting(
        "float32", "what travels between nodes; bfloat16: half the bytes, and the result depends on the nodes too"
    )
    balance: Literal["auto", "on", "off"] = setting(
        "auto", "move partitions from slow ranks to fast ones; auto: where it changes no bit of the result"
    )
    drop_share: float = setting(
        0.0, "share of an iteration's partitions that may be dropped where ranks are late; it changes the result",
        minimum=0, maximum=1,
    )  # fmt: skip
    drop_budget_s: float | None = setting(
        None, "seconds of an iteration after which a rank drops what it has not started; default: learned", minimum=0
    )
    drop_warmup: int = setting(50, "iterations from which drop_budget_s is learned", minimum=1)
    error_feedback: bool = setting(
        False, "with wire bfloat16: what rounding takes from a gradient is kept and added to the next one"
    )
    bucket_mb: float | Literal["auto"] = setting(
        "auto", "MiB of gradients that travel together between nodes; auto: what is fastest in the first iterations",
        minimum=0,
    )  # fmt: skip
    clip_norm: float | None = setting(None, "bound of the gradient's norm; default: none", minimum=0)
    clip_value: float | None = setting(None, "bound of each gradient element's magnitude; default: none", minimum=0)
    threads_per_rank: int | Literal["auto"] = setting(
        "auto", "torch threads of a rank; auto: its cores, shared fairly with other ranks", minimum=1
    )
    seed: int = setting(
        0, "the initial weights, sample order and random streams are functions of it", minimum=0,
        maximum=2**63 - 1,
    )  # fmt: skip
    loader_workers: int = setting(0, "processes that load samples ahead, on every rank", minimum=0)
    eval_batch_size: int = setting(256, "samples of one forward pass in validation", minimum=1)
    validate_every: int | str = setting(
        1, "validations: a number of epochs, or a trigger such as 'iterations(500) | seconds(600)'; 0: never", minimum=0
    )
    checkpoint_every: int | str = setting(1, "checkpoints, likewise", minimum=0)
    keep_last: int | None = setting(None, "checkpoints to keep, the newest ones; default: all", minimum=1)
    keep_every: int | None = setting(
        None, "with keep_last: of the older checkpoints every so many-th stays as well", minimum=1
    )
    summarize_every: int | str = setting(0, "summaries of loss and gradient norm in the metrics, likewise", minimum=0)
    end_when: str | None = setting(
        None, 'trigger that ends the training early, such as \'reached("accuracy", 0.99) | plateau("loss", 5)\''
    )
    max_seconds: float | None = setting(
        None, "seconds after which to stop with a checkpoint; default: in time before Slurm ends the job", minimum=0
    )
    hang_seconds: float = setting(
        900.0, "seconds without any movement that make a hang, which is told with who is to blame; 0: never", minimum=0
    )  # fmt: skip
    on_hang: Literal["end", "warn"] = setting("end", "what is done about a hang")
    recovery: Literal["auto", "off"] = setting(
        "auto", "whether the others go on where a rank is lost; auto: where MPI can (mpirun --with-ft ulfm)"
    )
    progress: Literal["auto", "live", "plain", "quiet", "json"] = setting(
        "auto",
        "what is shown: a live view, lines, warnings only, or the metrics' lines; auto: live on a terminal, else plain",
    )
    trace: int = setting(
        0, "iterations of all ranks that are recorded into trace.json in the run directory, for Perfetto", minimum=0,
        maximum=1000,
    )  # fmt: skip
    tensorboard: bool = setting(False, "write TensorBoard's files, too (extra: tensorboard)")
    histograms: bool = setting(False, "a histogram of each parameter after every epoch, in the metrics and TensorBoard")
    on_event: str | None = setting(None, "package.module:callable, called on rank 0 with each event's name and fields")
    run_dir: str = setting("auto", "folder for the results; auto: the first free runs/NAME, runs/NAME-2")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name)))
        if self.batch_size < self.partitions:
            raise ConfigError(
                f"batch_size {self.batch_size} is smaller than partitions {self.partitions}; every partition "
                "needs at least one sample; raise batch_size or lower partitions"
            )


@functools.cache
def _fields() -> dict[str, tuple[dataclasses.Field[Any], tuple[type, ...], tuple[str, ...]]]:
    """Each field with the types it takes (NoneType too) and the words it takes."""
    found = {}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        hint = hints[field.name]
        is_single = not typing.get_args(hint) or typing.get_origin(hint) in (dict, Literal)
        parts = (hint,) if is_single else typing.get_args(hint)
        literals = [part for part in parts if typing.get_origin(part) is Literal]
        types = tuple(typing.get_origin(part) or part for part in parts if part not in literals)
        found[field.name] = (field, types, tuple(word for part in literals for word in typing.get_args(part)))
    return found


def field_names() -> tuple[str, ...]:
    """The names of all settings, in the order of `--help`."""
    return tuple(_fields())


def words(name: str) -> tuple[str, ...]:
    """The words that the setting takes, or its built-in names; none where it takes anything of its type."""
    field, types, literals = _fields()[name]
    return (
        literals or field.metadata["names"] or field.metadata["known"] or (("true", "false") if bool in types else ())
    )


def checked(name: str, value: object) -> Any:
    """The value as the field `name` keeps it: an integer becomes a float where the field is one.

    Raises:
        ConfigError: wrong type, not an allowed name, or out of range.
    """
    field, types, words = _fields()[name]
    if float in types and type(value) is int:
        value = float(value)
    if words and isinstance(value, str):
        if value not in words:
            raise ConfigError(f"{name} is {value!r}, must be {_wanted(types, words)}{near(value, words)}")
        return value
    # type(), not isinstance(): True is an int to isinstance, and `epochs = true` is a mistake.
    if type(value) not in types:
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}), must be {_wanted(types, words)}")
    if isinstance(value, int | float):
        _check_range(name, value, field.metadata)
    elif isinstance(value, str):
        _check_text(name, value, field.metadata["names"])
    elif isinstance(value, dict):
        _check_table(name, value)
        return dict(value)
    return value


def _wanted(types: Iterable[type], words: Iterable[str]) -> str:
    named = [_TYPE_NAMES[kind] for kind in types if kind in _TYPE_NAMES]
    return " or ".join(named + [repr(word) for word in words])


def _check_range(name: str, value: float, limits: typing.Mapping[str, Any]) -> None:
    minimum, maximum = limits["minimum"], limits["maximum"]
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}, must be a finite number")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name} is {value}, must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} is {value}, must be at most {maximum}")


def _check_text(name: str, value: str, names: tuple[str, ...]) -> None:
    if not value:
        raise ConfigError(f"{name} is empty; give a value or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {value!r}, which is not valid UTF-8 text; rename it") from None
    if names and value not in names and ":" not in value:
        raise ConfigError(
            f"{name} is {value!r}, must be one of {', '.join(names)}, or package.module:callable{near(value, names)}"
        )


def _check_table(name: str, value: object) -> None:
    """Allow what TOML can hold, so that every configuration can be written down and read again."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {key!r}, keys must be strings")
            _check_table(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_table(name, item)
    elif isinstance(value, str):
        if value:
            _check_text(name, value, ())
    elif type(value) not in (int, float, bool):
        raise ConfigError(
            f"{name} is {value!r} ({type(value).__name__}), must be a string, number, bool, list or table"
        )


def near(word: str, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean ...?", or nothing if no name is near."""
    matches = difflib.get_close_matches(word, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def load(path: str | Path | None, overrides: typing.Mapping[str, object] | None = None) -> Config:
    """Make the configuration: defaults, then the TOML file, then the overrides.

    Args:
        path: the job file, or None for the defaults alone.
        overrides: field name -> value, from the command line.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value is not allowed.
    """
    values = _read_file(Path(path)) if path is not None else {}
    for name in overrides or {}:
        if name not in field_names():
            raise ConfigError(f"unknown setting {name!r}{near(name, field_names())}")
    return Config(**{**values, **(overrides or {})})


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for name, value in values.items():
        if name not in field_names():
            hint = near(name, field_names()) or "; `mpidl train --help` lists all"
            raise ConfigError(f"{path}: unknown key {name!r}{hint}")
        try:
            checked(name, value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return values


def to_toml(config: Config) -> str:
    """The configuration as TOML text that `load` reads back to an equal one; unset fields are left out."""
    values = dataclasses.asdict(config)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        keys = [key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key) for key in value]
        pairs = [f"{key} = {_toml(item)}" for key, item in zip(keys, value.values(), strict=True)]
        return "{" + ", ".join(pairs) + "}"
    assert isinstance(value, list | tuple)
    return "[" + ", ".join(_toml(item) for item in value) + "]"


def config_hash(config: Config) -> str:
    """16 hex digits over the fields that all ranks must agree on."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _LOCAL_FIELDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Give the parser a flag for every field (or those named), `batch_size` as `--batch-size`."""
    group = parser.add_argument_group("settings (a flag wins over the job file)")
    for name in names or field_names():
        field, types, words = _fields()[name]
        none = [_NONE] if NoneType in types else []
        metavar = "|".join([kind.__name__.upper() for kind in types if kind in _TYPE_NAMES] + list(words) + none)
        shown = f" (default: {shown_default(field)})" if shown_default(field) else ""
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=metavar.replace("DICT", "{KEY = VALUE}"),
            help=(field.metadata["help"] + shown).replace("%", "%%"),
        )


def shown_default(field: dataclasses.Field[Any]) -> str:
    """A field's default as one would write it; "" for those that are nothing."""
    if field.default in (None, dataclasses.MISSING):
        return ""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def overrides_from(namespace: argparse.Namespace) -> dict[str, object]:
    """The values of the flags that were given, converted to their fields' types.

    Raises:
        ConfigError: the text is not such a value.
    """
    given = {name: text for name, text in vars(namespace).items() if name in field_names()}
    return {name: _flag_value(name, text) for name, text in given.items()}


def _flag_value(name: str, text: str) -> object:
    flag = f"--{name.replace('_', '-')}"
    try:
        return checked(name, _parse(name, text))
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None
    except (ValueError, RecursionError) as error:
        detail = f" ({error})" if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise ConfigError(f"{flag} is {text!r}, must be {_wanted(*_fields()[name][1:])}{detail}") from None


def _parse(name: str, text: str) -> object:
    _, types, words = _fields()[name]
    if NoneType in types and text == _NONE:
        return None
    if int in types and str in types and re.fullmatch(r"[+-]?\d+", text):
        return int(text)  # of epochs, where any other text is a trigger
    if text in words or str in types or not types:
        return text
    if dict in types or bool in types:
        return tomllib.loads(f"value = {text}")["value"]
    return (int if int in types else float)(text)
