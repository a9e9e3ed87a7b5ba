"""A training loop of one's own: an ordinary PyTorch loop with three changed lines, marked (1), (2), (3).

Run it: mpirun -n 4 python jobs/own_loop.py
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpidl
from mpidl.data import digits
from mpidl.models import DigitsCNN

EPOCHS = 8


def main() -> None:
    """Train the digits, then count on all ranks how many held-out ones are right."""
    train, validation = (TensorDataset(*map(torch.as_tensor, part)) for part in digits())
    sampler = mpidl.RankBatchSampler(train, batch_size=16)  # (1) this rank's samples
    loader = DataLoader(train, batch_sampler=sampler)
    model = DigitsCNN()
    make_optimizer = functools.partial(torch.optim.AdamW, lr=2e-3)
    manager = mpidl.ParameterManager(model, make_optimizer)  # (2) instead of the optimizer
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(manager.optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            manager.step(num_samples=len(images))  # (3) instead of optimizer.step(); zeroes the gradients
        schedule.step()
        right = mpidl.allreduce(count_right(model, validation))
        if mpidl.rank() == 0:
            print(f"epoch {epoch + 1}: {right / len(validation):.2%} of {len(validation)} held-out digits", flush=True)
    if mpidl.rank() == 0:
        torch.save(model.state_dict(), "own_loop.pt")
    mpidl.barrier()


def count_right(model: nn.Module, data: TensorDataset) -> int:
    """How many of this rank's share of the samples are classified right: every sample once over all ranks."""
    model.eval()
    images, labels = data.tensors
    share = slice(mpidl.rank(), None, mpidl.size())
    with torch.no_grad():
        return int((model(images[share]).argmax(dim=1) == labels[share]).sum())


if __name__ == "__main__":
    main()
