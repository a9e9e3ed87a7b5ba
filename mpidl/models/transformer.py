"""A GPT: a transformer that says of each position of a text what comes next.

Source: Radford and others, "Language models are unsupervised multitask learners" (GPT-2), 2019. With its sizes (width
768, 12 layers, 12 heads, context 1024, 50,257 tokens) it has GPT-2's 124,439,808 parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpidl.errors import ConfigError
from mpidl.models.checks import check_count, check_share, check_tokens


def gpt(
    *,
    vocab_size: int = 256,
    context: int = 128,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """Make a small GPT: 842,496 parameters for texts of bytes; see `GPT` for the arguments."""
    return GPT(vocab_size, context, width, layers, heads, dropout)


class GPT(nn.Module):
    """Embeddings of tokens and positions, blocks of attention and two linear layers, scores by the same embeddings.

    Args:
        vocab_size: how many tokens there are.
        context: the most positions that it looks at.
        width: of the vector that each position has.
        layers: number of blocks.
        heads: of each attention; they divide the width.
        dropout: share of values that training drops.

    Raises:
        ConfigError: an argument is out of its range, or the heads do not divide the width.
    """

    def __init__(self, vocab_size: int, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        counts = {"vocab_size": vocab_size, "context": context, "width": width, "layers": layers, "heads": heads}
        for argument, value in counts.items():
            check_count("gpt", argument, value)
        check_share("gpt", "dropout", dropout)
        if width % heads:
            raise ConfigError(f"gpt: {heads} heads do not divide the width {width}; give a multiple of it")
        self.num_classes = vocab_size
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # What blocks add up stays in scale, however many there are (GPT-2, section 2.3).
                is_added = name.endswith("project.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if is_added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score what comes after each position.

        Args:
            tokens: int64 or int32, (batch, positions), each in [0, vocab_size); at most `context` positions.

        Returns:
            Logits, (batch, vocab_size, positions): classes come second, as torch's losses have it.

        Raises:
            DataError: the tokens are of another shape or type.
        """
        check_tokens("gpt", tokens, self.context)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        hidden = self.norm(self.blocks(hidden))  # (batch, positions, width)
        return functional.linear(hidden, self.token_embedding.weight).transpose(1, 2)


class _Block(nn.Module):
    """Attention to earlier positions, then two linear layers, each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.linear_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, positions, width) to the same."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        expanded = functional.gelu(self.expand(self.linear_norm(hidden)), approximate="tanh")
        added: Tensor = hidden + self.dropout(self.project(expanded))
        return added


class _Attention(nn.Module):
    """Each position's weighted mean over itself and the positions before, several times side by side."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.share = dropout
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, positions, width) to the same."""
        batch, positions, width = hidden.shape
        split = self.attend(hidden).view(batch, positions, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, positions, width / heads)
        share = self.share if self.training else 0.0
        means = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=share, is_causal=True)
        mixed: Tensor = self.dropout(self.project(means.transpose(1, 2).reshape(batch, positions, width)))
        return mixed
