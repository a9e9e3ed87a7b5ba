"""Distributed, exact evaluation: every sample counts once, and the bits do not depend on the ranks.

The samples are cut into fixed chunks; each rank runs a contiguous range of chunks; the chunks' sums are gathered on
all ranks and added in chunk order, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def _span(chunk: int) -> tuple[int, int]:
        return chunk * batch_size, min(len(source), (chunk + 1) * batch_size)

    num_chunks = -(-len(source) // batch_size)
    chunks = Assignment.even(num_chunks, world.size)
    first, last = chunks.range_of(world.rank)
    sums = np.zeros((last - first, 3 + len(metrics)))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for chunk in range(first, min(first + CHUNKS_AHEAD, last)):
                loader.request(0, *_span(chunk))
            for chunk in range(first, last):
                if chunk + CHUNKS_AHEAD < last:
                    loader.request(0, *_span(chunk + CHUNKS_AHEAD))
                start, stop = _span(chunk)
                samples = stop - start
                inputs, targets = split_batch(loader.next())
                seed_everything(partition_seed(seed, 0, chunk))
                outputs = call_model(model, inputs)
                total, weight = loss_sum(loss_fn, outputs, targets, samples)
                values = [float(metric(outputs, targets)) for metric in metrics.values()]
                sums[chunk - first] = [float(total), weight, samples, *values]
    finally:
        for module, training in modes:  # a part may have been in evaluation mode before
            module.training = training
    width = sums.shape[1]
    counts = [width * (chunks.starts[r + 1] - chunks.starts[r]) for r in range(world.size)]
    gathered = world.for_purpose("validation").allgather_varying(sums.reshape(-1), counts).reshape(-1, width)
    loss_total, weight_total, num_samples, *totals = (float(value) for value in gathered.sum(axis=0))
    if weight_total == 0:
        raise UserError("the data set's weights add up to zero; there is no mean loss")
    means = {name: value / num_samples for name, value in zip(metrics, totals, strict=True)}
    return {"loss": loss_total / weight_total, **means, "samples": num_samples}
