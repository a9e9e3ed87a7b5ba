"""What it costs to be ready for lost ranks: mpirun --with-ft ulfm -n 2 python jobs/ready.py [MODEL [BATCH [PAIRS]]].

Trains MODEL (default: lenet5) on random samples, with `recovery="auto"` and with "off" in turn, under the same MPI and
in the same processes, and tells an iteration's median time of both, with quartiles. Of each training the first epoch
does not count: it compiles, allocates, and finds out how large groups and how often kept starts should be.
"""

import functools
import itertools
import statistics
import sys

import torch
from torch import nn

import mpidl
from mpidl.data.synthetic import synthetic
from mpidl.models import build
from mpidl.runtime import ulfm

SHAPES = {"lenet5": (1, 28, 28), "vgg16_32": (3, 32, 32)}
ITERATIONS = {"lenet5": 200, "vgg16_32": 4}
EPOCHS = 6


def iteration_seconds(name: str, batch: int, recovery: str) -> list[float]:
    """Of every epoch of one training but the first; BATCH samples a rank."""
    train_set, _ = synthetic(shape=SHAPES[name], num_classes=10, num_samples=batch * mpidl.size() * ITERATIONS[name])
    trainer = mpidl.Trainer(
        build(name, num_classes=10),
        nn.functional.cross_entropy,
        functools.partial(torch.optim.SGD, lr=0.001, momentum=0.9),
        batch_size=batch * mpidl.size(),
        threads_per_rank=1,
        recovery=recovery,
        progress="quiet",
    )
    history = trainer.fit(train_set, epochs=EPOCHS)
    trainer.close()
    return [event["seconds"] / ITERATIONS[name] for event in history if event["event"] == "epoch"][1:]


if __name__ == "__main__":
    name, batch, pairs = (sys.argv[1:] + ["lenet5", "64", "5"][len(sys.argv) - 1 :])[:3]
    found = {"off": [], "auto": []}
    mpidl.init(1)
    for recovery in itertools.islice(itertools.cycle(found), 2 * int(pairs)):
        found[recovery] += iteration_seconds(name, int(batch), recovery)
    if mpidl.rank() == 0:
        print(f"{name}, {batch} samples a rank, {mpidl.size()} ranks; lost ranks can be survived: {ulfm.is_on()}")
        for recovery, seconds in found.items():
            low, median, high = (1e3 * part for part in statistics.quantiles(seconds, n=4))
            print(f'recovery="{recovery}": {median:.4g} ms an iteration, quartiles {low:.4g} to {high:.4g}')
        ratio = statistics.median(found["auto"]) / statistics.median(found["off"])
        print(f"ready costs {100 * (ratio - 1):.2f} %")
