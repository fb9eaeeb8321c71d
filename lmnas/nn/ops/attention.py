"""Operations of Transformer encoders: attention, linear transforms, span-based dynamic convolution; padding included.

Shapes: B batch, T time, H hidden, N heads, D = H / N features of a head, K kernel. Sequences are padded at the end;
`lengths` (B,) says how much of each is real, None: all of it. What stands at padded positions never reaches a real one:
a transform over positions is taken at each sequence's own length.

Vaswani et al., 2017, arXiv 1706.03762 (attention); Shaw et al., 2018, arXiv 1803.02155 (relative keys); Lee-Thorp et
al., 2021, arXiv 2105.03824 (Fourier mixing); Jiang et al., ConvBERT, 2020, arXiv 2008.02496 (span dynamic convolution);
as combined in Tuli et al., FlexiBERT, 2022, arXiv 2205.11656.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Transform = Literal["DFT", "DCT"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H) -> (B, N, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, T, D) -> (B, T, H)."""
    return x.transpose(1, 2).flatten(2)


def real_positions(lengths: Tensor, time: int) -> Tensor:
    """(B, T) bool: which positions are not padding."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, H) with zeros at padded positions."""
    return x if lengths is None else x * real_positions(lengths, x.shape[1])[..., None]


def relative_key_scores(query: Tensor, table: Tensor) -> Tensor:
    """Scores of queries for relative distances: score[i, j] = query[i] · table[i - j + L - 1].

    Args:
        query: (B, N, T, D).
        table: (2L - 1, D), one row a distance from -(L - 1) to L - 1; T is at most L.

    Returns:
        (B, N, T, T), to be added to the dot products before they are scaled.

    Raises:
        ValueError: the sequence is longer than the table reaches.

    Shaw et al., 2018, eq. 5; the `relative_key` of BERT implementations.
    """
    time, reach = query.shape[2], (table.shape[0] + 1) // 2
    if time > reach:
        raise ValueError(f"{time} positions; relative keys reach {reach}")
    products = query @ table[reach - time : reach + time - 1].t()  # every distance that occurs, (B, N, T, 2T - 1)
    positions = torch.arange(time, device=query.device)
    distance = positions[:, None] - positions + time - 1
    return products.gather(-1, distance.expand(*query.shape[:2], time, time))


def mask_padding(scores: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, N, T, T) scores with -inf where the key is padding."""
    if lengths is None:
        return scores
    return scores.masked_fill(~real_positions(lengths, scores.shape[-1])[:, None, None, :], -math.inf)


def dct(x: Tensor) -> Tensor:
    """Discrete cosine transform (type II, not normalised) over the last axis: 2 Σ_n x[n] cos(π k (2n + 1) / 2N).

    One complex transform of the N values, the even ones first and the odd ones backwards after them (Makhoul, 1980).
    """
    n = x.shape[-1]
    shuffled = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    angle = torch.arange(n, device=x.device, dtype=x.dtype) * (math.pi / (2 * n))
    spectrum = torch.fft.fft(shuffled)
    return 2 * (spectrum.real * angle.cos() + spectrum.imag * angle.sin())


def cosine_mix(x: Tensor) -> Tensor:
    """(..., T, F) -> (..., T, F): the DCT over features, then over positions."""
    return dct(dct(x).transpose(-1, -2)).transpose(-1, -2)


def fourier_mix(x: Tensor) -> Tensor:
    """(..., T, F) -> (..., T, F): real part of the Fourier transform over features, then over positions."""
    return torch.fft.fft2(x).real


MIXES: dict[str, Callable[[Tensor], Tensor]] = {"DFT": fourier_mix, "DCT": cosine_mix}


def by_length(mix: Callable[[Tensor], Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    """`mix` over the real positions of each sequence; zeros at padding.

    Args:
        mix: (..., T, F) -> (..., T, F) for any T.
        x: (B, ..., T, F).
    """
    if lengths is None:
        return mix(x)
    mixed = torch.zeros_like(x)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        mixed[rows, ..., :length, :] = mix(x[rows, ..., :length, :])
    return mixed


def dynamic_convolution(values: Tensor, kernels: Tensor) -> Tensor:
    """A convolution whose kernel differs by position and head: y[t] = Σ_k kernel[t, k] · values[t + k - (K - 1) / 2].

    Args:
        values: (B, T, N · D); zeros stand beyond both ends.
        kernels: (B, T, N, K), K odd, one kernel for all features of a head.

    Returns:
        (B, T, N · D).
    """
    heads, size = kernels.shape[2:]
    spans = F.pad(values, (0, 0, size // 2, size // 2)).unfold(1, size, 1)  # (B, T, N · D, K)
    return torch.einsum("btndk,btnk->btnd", spans.unflatten(2, (heads, -1)), kernels).flatten(2)


class SeparableConv(nn.Module):
    """A convolution over time of each feature alone, then a map of the features. (B, T, H) -> (B, T, outputs)."""

    def __init__(self, width: int, outputs: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.pointwise = nn.Conv1d(width, outputs, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.pointwise(self.depthwise(x.transpose(1, 2))) + self.bias).transpose(1, 2)


class RelativeKeys(nn.Module):
    """The table of `relative_key_scores`, reaching `max_length` positions."""

    def __init__(self, size: int, max_length: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * max_length - 1, size))

    def forward(self, query: Tensor) -> Tensor:
        return relative_key_scores(query, self.table)


class Attention(nn.Module):
    """Multi-head attention without its output map: softmax((Q Kᵀ + relative keys) / sqrt(D)) V. (B, T, H) -> (B, T, H).

    Args:
        weighted: multiplicative attention, Q W Kᵀ. `head`: one D x D matrix W for all heads (FlexiBERT); `full`: one
            H x H map of all queries together (the networks that Serianni & Kalita scored); None: Q Kᵀ.
        max_length: how far relative keys reach; None: no relative keys.
    """

    def __init__(
        self, hidden: int, heads: int, weighted: Literal["head", "full"] | None = None, max_length: int | None = None
    ):
        super().__init__()
        self.heads, self.weighted = heads, weighted
        self.head_size = size = hidden // heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        if weighted:
            width = size if weighted == "head" else hidden
            self.weight = nn.Linear(width, width, bias=False)
        self.relative = RelativeKeys(size, max_length) if max_length else None
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        asked = split_heads(self.weight(query) if self.weighted == "full" else query, self.heads)
        key, value = split_heads(key, self.heads), split_heads(value, self.heads)
        scores = (self.weight(asked) if self.weighted == "head" else asked) @ key.transpose(-1, -2)
        if self.relative is not None:
            scores = scores + self.relative(asked)  # of the unweighted query
        weights = self.softmax(mask_padding(scores / math.sqrt(asked.shape[-1]), lengths))
        return merge_heads(weights @ value)


class TransformAttention(nn.Module):
    """Attention by position alone, plus a transform of the input: softmax(relative keys / sqrt(D)) V + mix(x).

    (B, T, H) -> (B, T, H). Tuli et al., 2022, section 3.1.2. Departure: their unused key map is left out.
    """

    def __init__(self, hidden: int, heads: int, transform: Transform, max_length: int):
        super().__init__()
        self.heads, self.head_size, self.mix = heads, hidden // heads, MIXES[transform]
        self.query, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.relative = RelativeKeys(hidden // heads, max_length)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        query, value = split_heads(self.query(x), self.heads), split_heads(self.value(x), self.heads)
        scores = self.relative(query) / math.sqrt(query.shape[-1])
        attended = self.softmax(mask_padding(scores, lengths)) @ value
        return merge_heads(attended) + by_length(self.mix, x, lengths)


class HeadTransform(nn.Module):
    """A linear map, then a transform over each head's features and the positions. (B, T, H) -> (B, T, H).

    The linear transform of the networks that Serianni & Kalita, 2023, scored and trained.
    """

    def __init__(self, hidden: int, heads: int, transform: Transform):
        super().__init__()
        self.heads, self.head_size, self.mix = heads, hidden // heads, MIXES[transform]
        self.input = nn.Linear(hidden, hidden)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        mixed = by_length(self.mix, split_heads(self.input(x), self.heads), lengths)
        self.softmax(mixed)  # nothing uses it, but the published softmax confidence was read from it
        return merge_heads(mixed)


class SpanConvolution(nn.Module):
    """Half of the heads attend, the other half convolve with kernels made from spans. (B, T, H) -> (B, T, H).

    kernel[t] = softmax(map(separable_conv(x)[t] ⊙ query[t])), one a head and position. Jiang et al., ConvBERT, 2020,
    section 3.2, head ratio 2.
    """

    def __init__(self, hidden: int, heads: int, kernel: int, max_length: int | None = None):
        super().__init__()
        self.heads, self.head_size, self.kernel = heads // 2, hidden // heads, kernel
        half = hidden // 2
        self.query, self.key, self.value = (nn.Linear(hidden, half) for _ in range(3))
        self.span = SeparableConv(hidden, half, kernel)
        self.to_kernel = nn.Linear(half, self.heads * kernel)
        self.convolved = nn.Linear(hidden, half)
        self.relative = RelativeKeys(half // self.heads, max_length) if max_length else None
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        mixed_query = self.query(x)
        spans = self.span(zero_padding(x, lengths)) * mixed_query
        kernels = self.to_kernel(spans).unflatten(-1, (self.heads, self.kernel)).softmax(dim=-1)
        convolved = dynamic_convolution(zero_padding(self.convolved(x), lengths), kernels)
        query, key, value = (split_heads(part, self.heads) for part in (mixed_query, self.key(x), self.value(x)))
        scores = query @ key.transpose(-1, -2)
        if self.relative is not None:
            scores = scores + self.relative(query)
        weights = self.softmax(mask_padding(scores / math.sqrt(query.shape[-1]), lengths))
        return torch.cat([merge_heads(weights @ value), convolved], dim=-1)
