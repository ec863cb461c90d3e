"""From the objects of a tile to one vector: Set2Set a type, then attention over the types.

Set2Set: Vinyals et al. (ICLR 2016). GeoLink (NeurIPS 2025), section 3.2, "region read-out".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsosm_cli.models.flat import N_TYPES, FlatGraph, segment_softmax, segment_sum


class Set2Set(nn.Module):
    """``n_sets`` independent Set2Set read-outs side by side, all graphs and all sets in each step at once.

    The LSTM's query half of the input is its own last state, so their two matrices act as one.
    """

    def __init__(self, width: int, *, n_sets: int, steps: int = 5) -> None:
        super().__init__()
        self.width = width
        self.n_sets = n_sets
        self.steps = steps
        bound = width**-0.5  # as torch's LSTM
        self.weight_input = nn.Parameter(torch.empty(n_sets, 4 * width, 2 * width).uniform_(-bound, bound))
        self.weight_state = nn.Parameter(torch.empty(n_sets, 4 * width, width).uniform_(-bound, bound))
        self.bias_input = nn.Parameter(torch.empty(n_sets, 4 * width).uniform_(-bound, bound))
        self.bias_state = nn.Parameter(torch.empty(n_sets, 4 * width).uniform_(-bound, bound))

    def forward(self, x: Tensor, segment: Tensor, n_graphs: int) -> Tensor:
        """Return (n_sets, B, 2 C) of ``x`` (N, C), where ``segment`` (N,) is ``set * B + graph``."""
        n_segments = self.n_sets * n_graphs
        with torch.autocast(x.device.type, enabled=False):  # the recurrence is short, its errors add up
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weight = torch.cat(
                (self.weight_input[:, :, : self.width] + self.weight_state, self.weight_input[:, :, self.width :]), 2
            ).transpose(1, 2)
            bias = (self.bias_input + self.bias_state)[:, None]
            state = x.new_zeros(self.n_sets, n_graphs, self.width)
            cell, read = state, state
            for _ in range(self.steps):
                gates = torch.baddbmm(bias, torch.cat((state, read), -1), weight)
                enter, forget, new, leave = gates.chunk(4, -1)
                cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
                state = leave.sigmoid() * cell.tanh()
                query = state.reshape(n_segments, self.width).index_select(0, segment)
                alpha = segment_softmax((x * query).sum(-1), segment, n_segments)
                read = segment_sum(alpha[:, None] * x, segment, n_segments).view_as(state)
        return torch.cat((state, read), -1)


class RegionReadout(nn.Module):
    """The vector of a tile's objects (B, C): Set2Set and a linear layer a type, then a weighted sum over the types
    present.

    ``softmax`` weights the types by attention, as the paper says; ``sum`` adds them, which is what the published code
    does (its softmax runs over an axis of size 1). A tile without objects has the zero vector.
    """

    def __init__(self, width: int, *, attention: str) -> None:
        super().__init__()
        self.read = Set2Set(width, n_sets=N_TYPES)
        self.weight = nn.Parameter(torch.empty(N_TYPES, width, 2 * width))
        self.bias = nn.Parameter(torch.zeros(N_TYPES, width))
        bound = (6.0 / (3 * width)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.attention = nn.Linear(width, 1) if attention == "softmax" else None
        if self.attention is not None:
            nn.init.xavier_uniform_(self.attention.weight)
            nn.init.zeros_(self.attention.bias)

    def forward(self, x: Tensor, graph: FlatGraph) -> Tensor:
        read = self.read(x, graph.segment, graph.n_graphs)  # (3, B, 2 C)
        vectors = torch.baddbmm(self.bias[:, None], read, self.weight.transpose(1, 2))  # (3, B, C)
        present = present_types(graph)  # (3, B)
        if self.attention is None:
            return torch.where(present[..., None], vectors, 0).sum(0)
        # A finite floor: a tile without any object has no type to attend to, and must not become NaN.
        scores = self.attention(vectors)[..., 0].float().masked_fill(~present, -1e9)
        share = scores.softmax(0).masked_fill(~present, 0)
        return (share[..., None] * vectors).sum(0)


def present_types(graph: FlatGraph) -> Tensor:
    """Return (3, B) whether a graph has any node of a type."""
    ones = torch.ones_like(graph.segment, dtype=torch.float32)
    return segment_sum(ones, graph.segment, N_TYPES * graph.n_graphs).view(N_TYPES, -1) > 0
