"""Data: sources of samples, their order, and the loader that reads them ahead. Does not import torch."""

from mpidl.data.arrays import ArraySource, check_labels
from mpidl.data.digits import digits
from mpidl.data.fashion_mnist import ImageSource, fashion_mnist
from mpidl.data.idx import read_idx
from mpidl.data.loader import Loader
from mpidl.data.named import NAMES, load_named
from mpidl.data.order import partition_seed, permute, sample_seed, seed_everything
from mpidl.data.sources import (
    Batch,
    DatasetSource,
    ReadError,
    Source,
    as_source,
    collate,
)

__all__ = [
    "NAMES",
    "ArraySource",
    "Batch",
    "DatasetSource",
    "ImageSource",
    "Loader",
    "ReadError",
    "Source",
    "as_source",
    "check_labels",
    "collate",
    "digits",
    "fashion_mnist",
    "load_named",
    "partition_seed",
    "permute",
    "read_idx",
    "sample_seed",
    "seed_everything",
]
