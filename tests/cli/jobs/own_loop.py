"""A loop of one's own over nothing but a ParameterManager; one rank may end in the way that FATE names.

`own_loop.py NUM_PASSES [HANG_SECONDS ON_HANG [FOLDER]]`; what is printed at the end is the same on all ranks.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch.nn.functional import cross_entropy

import mpidl
from mpidl.data import load_named
from tests.cli.jobs.parts import EndingNet

torch.manual_seed(0)
model = EndingNet()
manager = mpidl.ParameterManager(model, functools.partial(torch.optim.SGD, lr=0.1))
(images, labels), _ = load_named("digits")
if len(sys.argv) > 2:
    mpidl.watch(float(sys.argv[2]), *sys.argv[3:])  # now that the slow imports are done
for number in range(int(sys.argv[1])):
    mine = slice(16 * number + mpidl.rank(), 16 * (number + 1), mpidl.size())
    cross_entropy(model(torch.from_numpy(images[mine])), torch.from_numpy(labels[mine])).backward()
    manager.step()
if mpidl.rank() == 0:
    print(f"all {mpidl.size()} ranks have ended")
