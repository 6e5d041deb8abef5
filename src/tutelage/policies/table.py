"""A tabular policy: the next token depends on the last `order` tokens through a table of logits.

Small enough to enumerate, differentiable, in any dtype: the library's own numbers are checked on it in float64.

Dimension letters:  B rows   T positions   D contexts = V ** order   V vocabulary   N targets
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data.collate import Batch
from tutelage.numerics.chunked import chunked_loss
from tutelage.policies.policy import LossFn, OutputLayer, per_target


class TablePolicy(nn.Module):
    """logits[b, t, v] = table[v, context(b, t)], where context is the last `order` tokens within the document.

    The table has the shape of an output layer and the hidden state is the one-hot context, so every path that a
    transformer takes (chunks, packing, weights) is taken here too, exactly.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        order: int = 1,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.order, self.chunk_size = vocab_size, order, chunk_size
        generator = torch.Generator().manual_seed(seed)
        num_contexts = (vocab_size + 1) ** order
        self.table_VD = nn.Parameter(torch.randn(vocab_size, num_contexts, dtype=dtype, generator=generator))

    @property
    def supports_packing(self) -> bool:
        return True

    @property
    def output_layer(self) -> OutputLayer:
        return OutputLayer(self.table_VD)

    def context_BT(self, token_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """(B, T) index of each position's context; positions before the document's start count as token V."""
        index = torch.zeros_like(token_ids_BT)
        for back in range(self.order):
            shifted = torch.roll(token_ids_BT, back, dims=1)
            index = index * (self.vocab_size + 1) + torch.where(position_ids_BT >= back, shifted, self.vocab_size)
        return index

    def hidden_states(self, batch: Batch) -> Tensor:
        """(B, T, D) one-hot contexts."""
        index = self.context_BT(batch.token_ids_BT, batch.position_ids_BT)
        return nn.functional.one_hot(index, self.table_VD.shape[1]).to(self.table_VD.dtype)

    def target_hidden(self, batch: Batch) -> Tensor:
        return self.hidden_states(batch).flatten(0, 1)[batch.target_positions_N]

    def per_target(self, batch: Batch, fn: LossFn) -> Tensor:
        return per_target(self.target_hidden(batch), self.output_layer, batch, fn)

    def logits(self, token_ids_BT: Tensor) -> Tensor:
        """(B, T, V) scores for the token after each position of unpadded rows."""
        position = torch.arange(token_ids_BT.shape[1]).expand_as(token_ids_BT)
        return self.table_VD.t()[self.context_BT(token_ids_BT, position)]

    def forward(
        self,
        batch: Batch,
        loss_fn: LossFn,
        *,
        divisor: float,
        stats_fn: Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return chunked_loss(
            self.target_hidden(batch),
            self.table_VD,
            batch.columns,
            loss_fn,
            divisor=divisor,
            chunk_size=self.chunk_size,
            stats_fn=stats_fn,
        )

    def use_plain_attention(self) -> None:
        """Nothing to switch: there is no attention."""

    @property
    def model(self) -> Any:
        return self
