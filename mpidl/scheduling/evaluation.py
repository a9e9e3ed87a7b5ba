"""Distributed, exact evaluation: every sample counts once, and the bits do not depend on the ranks.

The samples are cut into fixed chunks; each rank runs a contiguous range of chunks; the chunks' sums are gathered on
all ranks and added in chunk order, in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mpidl.data import Loader, Source, partition_seed, seed_everything
from mpidl.errors import UserError
from mpidl.parameters import Assignment
from mpidl.runtime import World
from mpidl.scheduling.forward import LossFunction, call_model, loss_sum, split_batch

Metric = Callable[[Any, Any], Any]

CHUNKS_AHEAD = 16
"""Requests that the loader has at a time."""


def evaluate(
    world: World,
    model: nn.Module,
    loss_fn: LossFunction,
    source: Source,
    *,
    batch_size: int,
    metrics: Mapping[str, Metric],
    seed: int,
    loader: Loader,
) -> dict[str, float]:
    """The mean loss and metrics of a data set. Collective; the same result on all ranks.

    Args:
        world: all ranks.
        model: put into evaluation mode for the time being.
        loss_fn: as in training.
        source: the data set.
        batch_size: samples of a chunk, on one rank.
        metrics: name -> function of (outputs, targets) that returns the SUM over the samples of the batch.
        seed: of the run.
        loader: of the source, not shuffled, with nothing outstanding.

    Returns:
        "loss", every metric by its name, each a mean over samples (the loss over its weights), and "samples".
    """
    spans = [(start, min(len(source), start + batch_size)) for start in range(0, len(source), batch_size)]
    chunks = Assignment.even(len(spans), world.size)
    own = range(*chunks.range_of(world.rank))
    sums = np.zeros((len(own), 3 + len(metrics)))
    with _evaluating(model):
        for chunk in own[:CHUNKS_AHEAD]:
            loader.request(0, *spans[chunk])
        for chunk, row in zip(own, sums, strict=True):
            if chunk + CHUNKS_AHEAD in own:
                loader.request(0, *spans[chunk + CHUNKS_AHEAD])
            world.activity.beat()
            inputs, targets = split_batch(loader.next())
            seed_everything(partition_seed(seed, 0, chunk))
            outputs = call_model(model, inputs)
            samples = spans[chunk][1] - spans[chunk][0]
            total, weight = loss_sum(loss_fn, outputs, targets, samples)
            row[:] = [float(total), weight, samples, *(float(each(outputs, targets)) for each in metrics.values())]
    width = sums.shape[1]
    counts = [width * (chunks.starts[r + 1] - chunks.starts[r]) for r in range(world.size)]
    gathered = world.for_purpose("validation").allgather_varying(sums.reshape(-1), counts).reshape(-1, width)
    return _means(gathered.sum(axis=0).tolist(), metrics)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, for the time being."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:  # a part may have been in evaluation mode before
            module.training = training


def _means(sums: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    """The result, of the sums over all chunks: loss, weight, samples, then a metric each."""
    loss, weight, samples, *metrics = sums
    if weight == 0:
        raise UserError("the data set's weights add up to zero; there is no mean loss")
    means = {name: value / samples for name, value in zip(names, metrics, strict=True)}
    return {"loss": loss / weight, **means, "samples": samples}
