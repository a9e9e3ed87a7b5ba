"""Plain text as a source of samples: windows of it, and the same windows one token further on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpidl.data.order import Int64Array
from mpidl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

Tokens = npt.NDArray[Any]  # uint8 bytes or uint32 numbers of characters


class TextSource:
    """Windows of a text that lie side by side; a batch is (tokens, the tokens after each): int64, (batch, context).

    Attributes:
        targets: the text's tokens, all of which are something's target but the first.
        vocabulary: the characters by their numbers, or None where tokens are bytes. One more number, the last, stands
            for characters that the training part does not have.
    """

    needs_seeds = False

    def __init__(self, tokens: Tokens, context: int, vocabulary: str | None = None) -> None:
        """Keep the tokens.

        Args:
            tokens: whole numbers, (length,); at least context + 1.
            context: tokens of a window.
            vocabulary: the characters that the tokens stand for.
        """
        self.targets = tokens
        self.vocabulary = vocabulary
        self._window = np.arange(context)

    def __len__(self) -> int:
        return (len(self.targets) - 1) // len(self._window)

    def read(self, indices: Int64Array, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Copy the windows at `indices`; seeds have no effect."""
        import torch

        places = indices[:, np.newaxis] * len(self._window) + self._window
        inputs, targets = (self.targets[places + offset].astype(np.int64) for offset in (0, 1))
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def text(
    data_dir: str | None = None,
    *,
    files: str = "**/*",
    tokens: str = "bytes",
    context: int = 128,
    held_out: float = 0.1,
) -> tuple[TextSource, TextSource | None]:
    """Read text files, one after the other in the order of their names, and hold out their end for validation.

    Args:
        data_dir: a file, or a folder.
        files: which files of the folder, as a pattern of pathlib's glob.
        tokens: "bytes", of which there are 256; or "characters" (the files are UTF-8), those of the training part.
        context: tokens of a sample; the model's, or fewer.
        held_out: share of the text, at its end, that is for validation; 0: none.

    Raises:
        ConfigError: no data_dir is given, or an argument is out of its range.
        DataError: nothing matches, a file is not UTF-8, or the text is shorter than one sample.
    """
    if data_dir is None:
        raise ConfigError("text needs a file or folder of texts; give it with --data-dir")
    if tokens not in ("bytes", "characters"):
        raise ConfigError(f"text: tokens is {tokens!r}; give bytes or characters")
    if type(context) is not int or context < 1:
        raise ConfigError(f"text: context is {context!r}; give an integer of at least 1")
    if type(held_out) not in (int, float) or not 0 <= held_out < 1:
        raise ConfigError(f"text: held_out is {held_out!r}; give a number of at least 0 and below 1")
    paths = _find(Path(data_dir), files)
    read = _bytes if tokens == "bytes" else _characters
    whole = np.concatenate([read(path) for path in paths])
    cut = len(whole) - round(len(whole) * held_out)
    parts = [whole[:cut], whole[cut:]] if held_out else [whole]
    for part, name in zip(parts, ("training", "held-out"), strict=False):
        if len(part) <= context:
            raise DataError(
                f"the {name} part of {data_dir} has {len(part)} {tokens}, and one sample takes {context + 1}; give "
                "more text or lower context"
            )
    vocabulary = None if tokens == "bytes" else np.unique(parts[0])
    return _sources(parts, context, vocabulary)


def bigram_entropy(tokens: Tokens) -> float:
    """The mean surprise at a token of whoever knows the one before and how often each pair occurs in this text.

    A model with a lower loss has learnt more than pairs.

    Args:
        tokens: whole numbers, (length,), at least two.

    Returns:
        Nats a token: H(pairs) - H(first of pairs).
    """
    first, second = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    pairs = first * (int(tokens.max()) + 1) + second
    return _entropy(pairs) - _entropy(first)


def _entropy(values: Int64Array) -> float:
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _find(place: Path, pattern: str) -> list[Path]:
    if not place.exists():
        raise DataError(f"{place} does not exist; give a text file or a folder of texts with --data-dir")
    if place.is_file():
        return [place]
    try:
        paths = sorted(path for path in place.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"text: files is {pattern!r}, which is no pattern: {error}") from None
    if not paths:
        raise DataError(f"{place} has no file that matches {pattern!r}; put texts there or change the argument files")
    return paths


def _bytes(path: Path) -> Tokens:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _characters(path: Path) -> Tokens:
    try:
        return np.frombuffer(_bytes(path).tobytes().decode("utf-8").encode("utf-32-le"), "<u4")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it, or let tokens be bytes"
        ) from None


def _sources(parts: list[Tokens], context: int, vocabulary: Tokens | None) -> tuple[TextSource, TextSource | None]:
    letters = None
    if vocabulary is not None:
        letters = vocabulary.astype("<u4").tobytes().decode("utf-32-le")
        parts = [_numbers(part, vocabulary) for part in parts]
    train, *held_out = (TextSource(part, context, letters) for part in parts)
    return train, held_out[0] if held_out else None


def _numbers(characters: Tokens, vocabulary: Tokens) -> Tokens:
    """Each character's place in the vocabulary, or the place after its last one."""
    places = np.minimum(np.searchsorted(vocabulary, characters), len(vocabulary) - 1)
    return np.where(vocabulary[places] == characters, places, len(vocabulary)).astype(np.uint32)
