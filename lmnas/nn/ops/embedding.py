"""Token embeddings of BERT-like models: word, position and segment tables, summed and normalised."""

import torch
from torch import Tensor, nn

from lmnas.nn.ops.attention import zero_padding


class TokenEmbedding(nn.Module):
    """(B, T) token ids -> (T, B, H). Clark et al., ELECTRA, 2020, arXiv 2003.10555: H may differ from the body's size.

    Args:
        positions: longest sequence; every position has a row of its own.
        segments: rows of the segment table; all tokens are of segment 0.
        padding_id: a token whose row is zero; None: none.
    """

    def __init__(self, vocabulary: int, width: int, positions: int, segments: int = 2, padding_id: int | None = 0):
        super().__init__()
        self.padding_id = padding_id
        self.words = nn.Parameter(torch.empty(vocabulary, width))
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.segments = nn.Parameter(torch.empty(segments, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Normal with deviation `init_range`; the padding row zero."""
        for table in (self.words, self.positions, self.segments):
            nn.init.normal_(table, 0.0, init_range, generator=generator)
        if self.padding_id is not None:
            with torch.no_grad():
                self.words[self.padding_id] = 0.0
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        summed = self.words[tokens] + self.positions[: tokens.shape[1]] + self.segments[0]
        return zero_padding(self.norm(summed), lengths).transpose(0, 1)
