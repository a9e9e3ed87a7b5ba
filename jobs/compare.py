"""What settings of the Trainer cost: mpirun -n 2 python jobs/compare.py A B [MODEL [BATCH [PAIRS]]].

A and B are settings as TOML writes them inside braces. Trainings with one and with the other are run in turn, in the
same processes, on random samples; told is an iteration's median time of both, with quartiles, and what B adds:

    mpirun -n 2 python jobs/compare.py 'trace = 0' 'trace = 1000'
    mpirun -n 2 python jobs/compare.py 'run_dir = ""' 'tensorboard = true'     # no files, and metrics in both forms
    mpirun --with-ft ulfm -n 2 python jobs/compare.py 'recovery = "off"' 'recovery = "auto"' vgg16_32 32 3

Of each training the first epoch does not count: it compiles, allocates, and finds out how large groups should be.
"""

import functools
import itertools
import statistics
import sys
import tempfile
import tomllib
from typing import Any

import torch
from torch import nn

import mpidl
from mpidl.data.synthetic import synthetic
from mpidl.models import build

SHAPES = {"lenet5": (1, 28, 28), "vgg16_32": (3, 32, 32)}
ITERATIONS = {"lenet5": 150, "vgg16_32": 4}
EPOCHS = 6


def iteration_seconds(name: str, batch: int, run_dir: str, settings: dict[str, Any]) -> list[float]:
    """Of every epoch of one training but the first; `batch` samples a rank."""
    iterations, settings = (
        ITERATIONS[name],
        {"run_dir": run_dir, "progress": "quiet", "checkpoint_every": 0, **settings},
    )
    train_set, _ = synthetic(shape=SHAPES[name], num_classes=10, num_samples=batch * mpidl.size() * iterations)
    trainer = mpidl.Trainer(
        build(name, num_classes=10),
        nn.functional.cross_entropy,
        functools.partial(torch.optim.SGD, lr=0.001, momentum=0.9),
        batch_size=batch * mpidl.size(),
        **settings | {"run_dir": settings["run_dir"] or None},
    )
    history = trainer.fit(train_set, epochs=EPOCHS)
    trainer.close()
    return [event["seconds"] / iterations for event in history if event["event"] == "epoch"][1:]


if __name__ == "__main__":
    if len(set(sys.argv[1:3])) < 2:
        sys.exit(__doc__)
    first, second, name, batch, pairs = (sys.argv[1:] + ["lenet5", "64", "5"][len(sys.argv) - 3 :])[:5]
    settings = {text: tomllib.loads(f"given = {{{text}}}")["given"] for text in (first, second)}
    found: dict[str, list[float]] = {text: [] for text in settings}
    mpidl.init(1)
    with tempfile.TemporaryDirectory() as own:
        folder = mpidl.broadcast_object(own)
        for number, text in enumerate(itertools.islice(itertools.cycle(settings), 2 * int(pairs))):
            found[text] += iteration_seconds(name, int(batch), f"{folder}/{number}", settings[text])
        mpidl.barrier()
    if mpidl.rank() == 0:
        print(f"{name}, {batch} samples a rank, {mpidl.size()} ranks")
        for text, seconds in found.items():
            low, median, high = (1e3 * part for part in statistics.quantiles(seconds, n=4))
            print(f"{text}: {median:.4g} ms an iteration, quartiles {low:.4g} to {high:.4g}")
        a, b = map(statistics.median, found.values())
        print(f"added: {100 * (b / a - 1):.2f} %")
