"""Losses that say what does not fit, and those for models with more than one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mpidl.errors import DataError

_ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "soft_margin_loss")
"""Torch's that would spread one shape over another, with no more than a warning."""


class Fitting:
    """One of torch's losses, with an error in words where a model's outputs do not fit the targets.

    Args:
        function: of `torch.nn.functional`.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function
        self._is_elementwise = function.__name__ in _ELEMENTWISE

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss.

        Raises:
            DataError: the function does not take them; names their types and shapes.
        """
        if self._is_elementwise and getattr(outputs, "shape", None) != getattr(targets, "shape", None):
            raise self._misfit(outputs, targets, "it compares element with element, so their shapes must be equal")
        try:
            return self.function(outputs, targets)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if "memory" in str(error):  # torch has no type of its own for what the machine lacks
                raise
            raise self._misfit(outputs, targets, str(error)) from error

    def _misfit(self, outputs: Any, targets: Any, reason: str) -> DataError:
        name = self.function.__name__
        return DataError(
            f"{name} does not take what the model returns, {_describe(outputs)}, with the targets, "
            f"{_describe(targets)}: {reason.rstrip('.')}; change the model's output, the targets or the loss"
        )


def _describe(value: Any) -> str:
    """`float32 of shape (16, 10)`."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


class WithAuxiliary:
    """A loss of several heads: the first one's, plus a share of each other's.

    A model such as `mpidl.models.googlenet` returns (logits, auxiliary logits, ...) while training and logits alone in
    evaluation mode; what is no tuple goes to the loss as it is. Job files need not name this: a model with an attribute
    `auxiliary_weight` gets it.

    Args:
        loss: of one head's outputs and the targets: a mean, or (sum, weight).
        weight: what the auxiliary heads' losses are multiplied by.

    Example:
        ```python
        trainer = mpidl.Trainer(models.googlenet(), losses.WithAuxiliary(cross_entropy), ...)
        ```
    """

    def __init__(self, loss: Callable[[Any, Any], Any], weight: float = 0.3) -> None:
        self._loss = loss
        self._weight = weight

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """The loss of a head or of several: like the inner one's, a tensor or (sum, weight)."""
        if not isinstance(outputs, tuple):
            return self._loss(outputs, targets)
        main, *others = (self._loss(each, targets) for each in outputs)
        if isinstance(main, tuple):
            total, weight = main
            return total + self._weight * sum(other[0] for other in others), weight
        return main + self._weight * sum(others)
