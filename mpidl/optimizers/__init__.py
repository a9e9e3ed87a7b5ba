"""Optimizers of mpidl's own, for ordinary PyTorch and for shards: those that take norms over whole tensors."""

from mpidl.optimizers.lamb import Lamb
from mpidl.optimizers.lars import Lars
from mpidl.optimizers.layerwise import LayerWise, Norms, Pairs, layer_groups

__all__ = ["Lamb", "Lars", "LayerWise", "Norms", "Pairs", "layer_groups"]
