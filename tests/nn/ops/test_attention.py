"""Every operation against loops over heads and positions, other libraries' transforms, and itself without padding."""

import math

import pytest
import torch
from scipy import fft
from torch import nn

from lmnas.core.seeds import generator
from lmnas.nn.ops.attention import (
    Attention,
    HeadTransform,
    SeparableConv,
    SpanConvolution,
    TransformAttention,
    by_length,
    cosine_mix,
    dct,
    dynamic_convolution,
    fourier_mix,
    merge_heads,
    relative_key_scores,
    split_heads,
)
from lmnas.nn.ops.embedding import TokenEmbedding

B, T, H, N = 3, 7, 12, 2
D, L = H // N, 9
pytestmark = pytest.mark.usefixtures("float64")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "attention", *shape))


def randomised(module, seed=1):
    for i, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, 0.0, 0.5, generator=generator(seed, i))
    return module


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_heads_are_slices_of_the_features():
    x = draw(B, T, H)
    heads = split_heads(x, N)
    for n in range(N):
        assert torch.equal(heads[:, n], x[:, :, n * D : (n + 1) * D])
    assert torch.equal(merge_heads(heads), x)


def slow_relative(query, table):
    reach, scores = (len(table) + 1) // 2, torch.zeros(*query.shape[:3], query.shape[2])
    for i in range(query.shape[2]):
        for j in range(query.shape[2]):
            scores[:, :, i, j] = (query[:, :, i] * table[i - j + reach - 1]).sum(-1)
    return scores


@pytest.mark.parametrize("time", [1, 5, L])
def test_relative_keys_follow_the_distance(time):
    query, table = draw(B, N, time, D), draw(2 * L - 1, D)
    close(relative_key_scores(query, table), slow_relative(query, table))


def test_relative_keys_reach_so_far():
    with pytest.raises(ValueError, match="10 positions; relative keys reach 9"):
        relative_key_scores(draw(B, N, L + 1, D), draw(2 * L - 1, D))


def attend(scores, value):
    """One sequence, one head, position by position: scores (T, T), value (T, D)."""
    rows = []
    for row in scores.detach() / math.sqrt(value.shape[-1]):
        weights = [math.exp(s - row.max()) for s in row]
        rows.append(sum(w / sum(weights) * v for w, v in zip(weights, value, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("weighted", [None, "head", "full"])
@pytest.mark.parametrize("reach", [None, L])
def test_attention_equals_a_loop(weighted, reach):
    module, x = randomised(Attention(H, N, weighted, reach)), draw(B, T, H)
    expected = torch.zeros(B, T, H)
    for b in range(B):
        query, key, value = module.query(x[b]), module.key(x[b]), module.value(x[b])
        asked = query @ module.weight.weight.t() if weighted == "full" else query
        for n in range(N):
            part = slice(n * D, (n + 1) * D)
            q = asked[:, part]
            matrix = module.weight.weight.t() if weighted == "head" else torch.eye(D)
            scores = torch.stack([torch.stack([q[i] @ matrix @ key[j, part] for j in range(T)]) for i in range(T)])
            if reach:
                scores = scores + slow_relative(q[None, None], module.relative.table)[0, 0]
            expected[b, :, part] = attend(scores, value[:, part])
    close(module(x), expected)


def test_plain_attention_equals_torch():
    module, x = randomised(Attention(H, N)), draw(B, T, H)
    theirs = nn.MultiheadAttention(H, N, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([module.query.weight, module.key.weight, module.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([module.query.bias, module.key.bias, module.value.bias]))
        theirs.out_proj.weight.copy_(torch.eye(H))
        theirs.out_proj.bias.zero_()
    close(module(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_dct_equals_scipy_and_the_sum(size):
    x = draw(B, size)
    close(dct(x), torch.from_numpy(fft.dct(x.numpy(), type=2)))
    n = torch.arange(size)
    for k in range(size):
        close(dct(x)[:, k], 2 * (x * torch.cos(math.pi * k * (2 * n + 1) / (2 * size))).sum(-1))


def test_mixes_equal_other_libraries():
    x = draw(B, N, T, D)
    close(cosine_mix(x), torch.from_numpy(fft.dctn(x.numpy(), type=2, axes=(-2, -1))))
    close(fourier_mix(x), torch.from_numpy(fft.fft(fft.fft(x.numpy(), axis=-1), axis=-2).real.copy()))
    t, f = torch.arange(T), torch.arange(D)  # one coefficient by its sum
    angle = -2 * math.pi * (2 * t[:, None] / T + 3 * f / D)
    close(fourier_mix(x)[..., 2, 3], (x * angle.cos()).sum((-2, -1)))


@pytest.mark.parametrize("transform, mix", [("DFT", fourier_mix), ("DCT", cosine_mix)])
def test_transform_attention_attends_by_position_and_adds_the_transform(transform, mix):
    module, x = randomised(TransformAttention(H, N, transform, L)), draw(B, T, H)
    query, value = split_heads(module.query(x), N), split_heads(module.value(x), N)
    scores = slow_relative(query, module.relative.table)
    attended = torch.stack([torch.stack([attend(scores[b, n], value[b, n]) for n in range(N)]) for b in range(B)])
    close(module(x), merge_heads(attended) + mix(x))


@pytest.mark.parametrize("transform, mix", [("DFT", fourier_mix), ("DCT", cosine_mix)])
def test_head_transform_takes_each_head_alone(transform, mix):
    module, x = randomised(HeadTransform(H, N, transform)), draw(B, T, H)
    mapped = module.input(x)
    close(module(x), torch.cat([mix(mapped[..., n * D : (n + 1) * D]) for n in range(N)], dim=-1))


def test_dynamic_convolution_equals_a_loop():
    values, kernels = draw(B, T, H), draw(B, T, N, 5)
    expected = torch.zeros(B, T, H)
    for t in range(T):
        for n in range(N):
            for k in range(5):
                if 0 <= t + k - 2 < T:
                    part = slice(n * D, (n + 1) * D)
                    expected[:, t, part] += kernels[:, t, n, k, None] * values[:, t + k - 2, part]
    close(dynamic_convolution(values, kernels), expected)


def test_separable_convolution_equals_a_loop():
    module, x = randomised(SeparableConv(H, 4, 5)), draw(B, T, H)
    expected = torch.zeros(B, T, 4)
    for t in range(T):
        depthwise = sum(module.depthwise.weight[:, 0, k] * x[:, t + k - 2] for k in range(5) if 0 <= t + k - 2 < T)
        expected[:, t] = depthwise @ module.pointwise.weight[:, :, 0].t() + module.bias[:, 0]
    close(module(x), expected)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("reach", [None, L])
def test_span_convolution_is_half_attention_half_convolution(heads, reach):
    module, x = randomised(SpanConvolution(H, heads, 5, reach)), draw(B, T, H)
    half, size = H // 2, H // heads
    query = module.query(x)
    kernels = torch.zeros(B, T, heads // 2, 5)
    spans = module.span(x)
    for b in range(B):
        for t in range(T):
            logits = module.to_kernel(spans[b, t] * query[b, t])
            for n in range(heads // 2):
                kernels[b, t, n] = logits[5 * n : 5 * (n + 1)].softmax(0)
    q, k, v = (split_heads(part, heads // 2) for part in (query, module.key(x), module.value(x)))
    scores = q @ k.transpose(-1, -2) + (slow_relative(q, module.relative.table) if reach else 0)
    attended = [torch.stack([attend(scores[b, n], v[b, n]) for n in range(heads // 2)]) for b in range(B)]
    out = module(x)
    assert q.shape[-1] == size
    close(out[..., :half], merge_heads(torch.stack(attended)))
    close(out[..., half:], dynamic_convolution(module.convolved(x), kernels))


OPERATIONS = {
    "attention": lambda: Attention(H, N, None, L),
    "weighted by head": lambda: Attention(H, N, "head", L),
    "weighted": lambda: Attention(H, N, "full"),
    "DFT": lambda: TransformAttention(H, N, "DFT", L),
    "DCT": lambda: TransformAttention(H, N, "DCT", L),
    "head DFT": lambda: HeadTransform(H, N, "DFT"),
    "head DCT": lambda: HeadTransform(H, N, "DCT"),
    "convolution": lambda: SpanConvolution(H, 4, 5, L),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_padding_changes_nothing_that_is_real(name):
    """Each sequence alone and unpadded gives what it gives in a padded batch, whatever stands at the padding."""
    module, lengths = randomised(OPERATIONS[name]()), torch.tensor([T, 4, 1])
    x, noise = draw(B, T, H), 100 * draw(B, T, H, seed=5)
    padded = torch.where(torch.arange(T)[None, :, None] < lengths[:, None, None], x, noise).requires_grad_()
    found = module(padded, lengths)
    real = [found[b, :length] for b, length in enumerate(lengths.tolist())]
    for b, rows in enumerate(real):
        close(rows, module(x[b : b + 1, : len(rows)])[0])
    (gradient,) = torch.autograd.grad(sum(rows.square().sum() for rows in real), padded)
    assert torch.isfinite(gradient).all() and gradient[0].abs().sum() > 0
    assert not gradient[1, 4:].any() and not gradient[2, 1:].any()
    close(module(x, torch.tensor([T] * B)), module(x))


def test_by_length_leaves_zeros_at_padding():
    out = by_length(fourier_mix, draw(B, T, H), torch.tensor([3, T, 3]))
    assert not out[0, 3:].any() and not out[2, 3:].any() and out[1, 3:].any()


def test_embedding_sums_and_normalises():
    module = TokenEmbedding(20, H, L)
    module.initialise(generator(0, "embedding"), 0.02)
    assert not module.words[0].any() and module.words.detach()[1:].std() == pytest.approx(0.02, rel=0.15)
    tokens = torch.tensor([[3, 5, 0], [7, 7, 1]])
    out = module(tokens)
    assert out.shape == (3, 2, H)
    for b in range(2):
        for t in range(3):
            summed = module.words[tokens[b, t]] + module.positions[t] + module.segments[0]
            close(out[t, b], (summed - summed.mean()) / (summed.var(unbiased=False) + 1e-12).sqrt())
    assert not module(tokens, torch.tensor([2, 3]))[2, 0].any()
