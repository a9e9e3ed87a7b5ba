"""Data: sources of samples, their order, and the loader that reads them ahead. Does not import torch."""

from mpidl.data.arrays import ArraySource, check_labels
from mpidl.data.cifar10 import cifar10
from mpidl.data.digits import digits
from mpidl.data.fashion_mnist import fashion_mnist
from mpidl.data.idx import read_idx
from mpidl.data.images import ImageFolderSource, images
from mpidl.data.loader import Loader
from mpidl.data.named import NAMES, load_named
from mpidl.data.order import partition_seed, permute, sample_seed, seed_everything
from mpidl.data.pixels import ImageSource
from mpidl.data.sources import (
    Batch,
    DatasetSource,
    ReadError,
    Source,
    as_source,
    collate,
)
from mpidl.data.synthetic import SyntheticSource, synthetic
from mpidl.data.text import TextSource, bigram_entropy, text

__all__ = [
    "NAMES",
    "ArraySource",
    "Batch",
    "DatasetSource",
    "ImageFolderSource",
    "ImageSource",
    "Loader",
    "ReadError",
    "Source",
    "SyntheticSource",
    "TextSource",
    "as_source",
    "bigram_entropy",
    "check_labels",
    "cifar10",
    "collate",
    "digits",
    "fashion_mnist",
    "images",
    "load_named",
    "partition_seed",
    "permute",
    "read_idx",
    "sample_seed",
    "seed_everything",
    "synthetic",
    "text",
]
