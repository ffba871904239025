"""Each fast operation of the speech transformers against the plain form, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_utils.speech import kernels
from esr_utils.speech.convolutions import ConvLayer, conv_frames, conv_stack, grouped_conv
from esr_utils.speech.transformer import attend, attend_padded

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative to the largest


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def leaves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(shape)).requires_grad_() for shape in shapes]


def assert_same(fast, plain, inputs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Both are functions of the inputs; values and all gradients agree."""
    found, expected = fast(*inputs), plain(*inputs)
    assert found.shape == expected.shape
    weight = torch.randn(expected.shape)
    pairs = [(found, expected)]
    for one, other in zip(
        *(torch.autograd.grad((y.float() * weight).sum(), inputs) for y in (found, expected)), strict=True
    ):
        pairs.append((one, other))
    for one, other in pairs:
        scale = float(other.detach().float().abs().max())
        torch.testing.assert_close(one.float(), other.float(), atol=TOLERANCE[dtype] * scale, rtol=0)


# Linear maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    def run(function):
        return lambda x, w, b: function(x.to(dtype), w.to(dtype), b.to(dtype))

    assert_same(run(kernels.linear), run(F.linear), leaves((7, 5), (3, 5), (3,)), dtype)
    assert_same(lambda x, w: kernels.linear(x, w), lambda x, w: F.linear(x, w), leaves((1, 5), (3, 5)))


def test_products_of_transposed_and_strided_matrices():
    """oneDNN has only a slow reference for some strides: 3000 rows would take minutes."""
    a, b = torch.randn(3000, 512), torch.randn(512, 768)
    for x, y in ((a, b.T), (a[::2], b.T), (a.T, a.T[:64]), (a, b[:, 100:612]), (a[:, ::2], b[:, :256])):
        torch.testing.assert_close(kernels.product(x, y), x @ y.T, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gelu_linear(p, dtype):
    z, weight, bias = leaves((40, 6), (3, 6), (3,))
    keep, scale = None, 1.0
    if p:
        torch.manual_seed(1)
        keep, scale = kernels.keep_mask(z, p)

    def fast(z, weight, bias):
        torch.manual_seed(1)
        return kernels.gelu_linear(z.to(dtype), weight, bias, p)

    def plain(z, weight, bias):
        x = F.gelu(z.to(dtype)) if keep is None else F.gelu(z.to(dtype)) * keep * scale
        return F.linear(x, weight.to(dtype), bias.to(dtype))

    assert_same(fast, plain, [z, weight, bias], dtype)


# Dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(1000, 1003)
    found = kernels.dropout(x, p)
    n, dropped = x.numel(), int((found == 0).sum())
    assert abs(dropped / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1 / 65536
    assert abs(float(found.double().mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)
    assert len(found.unique()) == 2
    # no pattern: neighbours, which come of one draw, are dropped independently
    for step in (1, 2, 3, 4, 1003):
        both = (found.flatten()[:-step] == 0) & (found.flatten()[step:] == 0)
        assert abs(float(both.double().mean()) - p * p) < 5 * math.sqrt(p * p / n) + 1e-4


def test_dropout_of_none_and_of_all():
    x = torch.randn(10, 3)
    assert kernels.dropout(x, 0.0) is x
    assert not bool(kernels.dropout(x, 1.0).any())


# Convolutions -----------------------------------------------------------------------------------------------


def test_conv_frames_is_what_conv1d_gives():
    for n in range(60, 100):
        kernels_, strides = (10, 3, 2), (5, 2, 2)
        x = torch.zeros(1, 1, n)
        for kernel, stride in zip(kernels_, strides, strict=True):
            x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
        assert int(conv_frames(torch.tensor(n), kernels_, strides)) == x.shape[2]


class FrontEnd(nn.Module):
    """The plain form: conv1d, norm, GELU; strides with windows that overlap, touch, and leave gaps."""

    def __init__(self, norm: str, bias: bool) -> None:
        super().__init__()
        shapes = [(1, 6, 10, 5), (6, 6, 3, 2), (6, 5, 2, 2), (5, 4, 5, 2), (4, 4, 1, 2), (4, 4, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv1d(i, o, kernel, stride, bias=bias) for i, o, kernel, stride in shapes)
        norms = {"layer": [nn.LayerNorm(o) for _, o, _, _ in shapes], "group": [nn.GroupNorm(6, 6)], "none": []}[norm]
        self.norms = nn.ModuleList([*norms, *[nn.Identity()] * (len(shapes) - len(norms))])
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter, 1.0, 0.5)

    def forward(self, wave: Tensor) -> Tensor:
        x = wave[None, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            x = F.gelu(norm(x.mT).mT if isinstance(norm, nn.LayerNorm) else norm(x))
        return x[0].T

    def fast(self, wave: Tensor, dtype: torch.dtype) -> Tensor:
        norms = [None if isinstance(norm, nn.Identity) else norm for norm in self.norms]
        first, *others = zip(self.convs, norms, strict=True)
        return conv_stack(wave, first, [ConvLayer.of(conv, norm, dtype) for conv, norm in others])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_the_front_end(norm, bias):
    """Long enough for two chunks, one of them with a single row."""
    plain, wave = FrontEnd(norm, bias), torch.randn(10 + 5 * (2 * 1024 + 2))
    results = [plain.fast(wave, torch.float32), plain.fast(wave, torch.bfloat16), plain(wave)]
    assert results[1].dtype == torch.bfloat16 and len({result.shape for result in results}) == 1
    names = [name for name, _ in plain.named_parameters() if not (norm == "group" and name == "convs.0.bias")]
    own = [dict(plain.named_parameters())[name] for name in names]
    weight = torch.randn(results[0].shape)
    fast, half, expected = ((y.detach(), *torch.autograd.grad((y * weight).sum(), own)) for y in results)
    for name, one, other in zip(("output", *names), fast, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5, name
    half, expected = (torch.cat([one.flatten().float() for one in found]) for found in (half, expected))
    assert float(F.cosine_similarity(half, expected, dim=0)) > 0.99


@pytest.mark.parametrize("kernel", [8, 9, 64, 128])
@pytest.mark.parametrize("n_clips", [1, 3, 4, 6])
def test_the_grouped_convolution(kernel, n_clips):
    """Through Fourier transforms too: of many clips, and a long kernel."""
    lengths = [1, 2 * kernel, kernel + 1, kernel + 2, kernel, 3 * kernel + 5][:n_clips]
    x, weight, bias = leaves((sum(lengths), 12), (12, 4, kernel), (12,))

    def plain(x, weight, bias):
        done = [
            F.conv1d(clip.T[None], weight, bias, padding=kernel // 2, groups=3)[0, :, : len(clip)].T
            for clip in x.split(lengths)
        ]
        return torch.cat(done)

    assert_same(lambda *inputs: grouped_conv(*inputs, 3, lengths, torch.float32), plain, [x, weight, bias])


# Attention --------------------------------------------------------------------------------------------------

LENGTHS, HEADS, WIDTH = [5, 1, 9, 4], 3, 12


def plain_attention(qkv, bias, gate, keeps=None, p=0.0):
    """One clip and one head after the other."""
    out = []
    start = 0
    for number, n in enumerate(LENGTHS):
        q, k, v = (part.view(n, HEADS, -1) for part in qkv[start : start + n].chunk(3, dim=1))
        heads = []
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head].T / math.sqrt(WIDTH // HEADS)
            if bias is not None:
                own = bias[head, :n, :n]
                scores = scores + (own if gate is None else gate[head, start : start + n, None] * own)
            weights = scores.softmax(-1)
            if keeps is not None:
                weights = weights * keeps[number][head] / (1 - p)
            heads.append(weights @ v[:, head])
        out.append(torch.stack(heads, dim=1).flatten(1))
        start += n
    return torch.cat(out)


@pytest.mark.parametrize("piece", [2**22, 30])  # all heads at once, or the longer clips' one by one
@pytest.mark.parametrize("form", ["none", "bias", "gated"])
@pytest.mark.parametrize("function", [attend, attend_padded])
def test_attention(function, form, piece, monkeypatch):
    monkeypatch.setattr("esr_utils.speech.transformer._PIECE", piece)
    qkv, bias, gate = leaves((sum(LENGTHS), 3 * WIDTH), (HEADS, 9, 9), (HEADS, sum(LENGTHS)))
    inputs = [qkv, bias, gate][: 1 + ["none", "bias", "gated"].index(form)]

    def fill(inputs):
        return (*inputs, *[None] * (3 - len(inputs)))

    assert_same(
        lambda *given: function(given[0], LENGTHS, HEADS, *fill(given)[1:], 0.0),
        lambda *given: plain_attention(*fill(given)),
        inputs,
    )


def test_attention_drops_the_same_weights_in_the_backward():
    p = 0.25
    qkv, bias, gate = leaves((sum(LENGTHS), 3 * WIDTH), (HEADS, 9, 9), (HEADS, sum(LENGTHS)))

    def fast(qkv, bias, gate):
        torch.manual_seed(5)
        return attend(qkv, LENGTHS, HEADS, bias, gate, p)

    torch.manual_seed(5)
    keeps = [kernels.keep_mask(torch.empty(HEADS, n, n), p)[0] for n in LENGTHS]
    assert_same(fast, lambda *given: plain_attention(*given, keeps, p), [qkv, bias, gate])


def test_attention_in_half_precision():
    qkv, bias, gate = leaves((sum(LENGTHS), 3 * WIDTH), (HEADS, 9, 9), (HEADS, sum(LENGTHS)))
    assert_same(
        lambda qkv, bias, gate: attend(qkv.bfloat16(), LENGTHS, HEADS, bias, gate),
        plain_attention,
        [qkv, bias, gate],
        torch.bfloat16,
    )
