"""Speech backbones behind one interface: waveforms in, the frames of every layer out, and a mask of the valid ones.

A clip's frames do not depend on what it is batched with: whatever lies past its end is set to zero before each
operation that looks sideways (the STFT, convolutions), and is masked out of attention. What comes after (layer mix,
pooling, projection) is in `retriever`, so that a frozen backbone's frames can be kept (`features`).
"""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from esr_utils import weights
from esr_utils.config import SAMPLE_RATE

MIN_SAMPLES = 400  # 25 ms, one analysis window; nothing shorter is taken


class SpeechBackbone(nn.Module):
    """The interface. A subclass sets the four numbers and defines `n_frames` and `layers`.

    Attributes:
        n_layers: L, how many layers' frames it gives.
        dim: D, width of a frame.
        hop: samples at 16 kHz from one frame to the next.
        max_samples: longest waveform it takes, in samples at 16 kHz.
    """

    n_layers: int
    dim: int
    hop: int
    max_samples: int

    def n_frames(self, n_samples: Tensor) -> Tensor:
        """Valid frames of clips of so many samples at 16 kHz: exact integer arithmetic, any shape."""
        raise TypeError(f"{type(self).__name__} does not define n_frames")

    def layers(self, waveform: Tensor, n_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Frames of every layer.

        Args:
            waveform: (B, S) float32 at 16 kHz; what lies past a clip's end is ignored.
            n_samples: (B,) valid samples of each clip, at least 400.

        Returns:
            (B, L, T, D) frames, zero where invalid, and the mask (B, T), True where valid.

        Raises:
            ValueError: a clip is shorter than 400 samples or longer than `max_samples`.
        """
        raise TypeError(f"{type(self).__name__} does not define layers")

    def set_trainable(self, trainable: bool) -> None:
        """Whether training may change the backbone; what its authors fixed stays fixed."""
        self.requires_grad_(trainable)

    def check_lengths(self, n_samples: Tensor) -> None:
        shortest, longest = int(n_samples.min()), int(n_samples.max())
        if shortest < MIN_SAMPLES:
            raise ValueError(f"a clip of {shortest} samples; the shortest allowed is {MIN_SAMPLES} (25 ms)")
        if longest > self.max_samples:
            raise ValueError(f"a clip of {longest} samples; {type(self).__name__} takes at most {self.max_samples}")


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, True at positions below the length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def active_frames(waveform: Tensor, n_samples: Tensor, hop: int, size: int) -> Tensor:
    """Which frames carry speech: within 35 dB of the clip's loudest, or within two frames of such a one.

    The silence around an acted sentence says nothing of its style, but moves the mean of its frames.

    Args:
        waveform: (B, S); what lies past a clip's end is ignored.
        hop: samples from one frame to the next.
        size: T, frames of the longest clip.

    Returns:
        (B, T) bool; every clip has at least one.
    """
    power = waveform.float().masked_fill(~length_mask(n_samples, waveform.shape[1]), 0.0).square()
    power = F.pad(power, (0, max(0, size * hop - power.shape[1])))[:, : size * hop]
    power = power.view(len(power), size, hop).mean(-1)
    power = F.max_pool1d(power[:, None], kernel_size=5, stride=1, padding=2)[:, 0]
    return power >= power.amax(dim=1, keepdim=True) * 10**-3.5


class LogMel(nn.Module):
    """Log-mel spectrogram as Whisper computes it, cut to the clip (Radford et al. 2022, section 2.2).

    25 ms Hann windows every 10 ms, Slaney mel filters, log10 floored 8 below the clip's own maximum, then (x + 4) / 4.
    """

    window, hop = 400, 160  # samples

    def __init__(self, n_mels: int = 80) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            self.window // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return -(-n_samples // self.hop)  # ceiling: a frame at every multiple of the hop inside the clip

    def forward(self, waveform: Tensor, n_samples: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), (B,) -> (B, n_mels, M) zero where invalid, and the mask (B, M)."""
        valid = length_mask(n_samples, waveform.shape[1])
        # Zeros after the end, for the last window to run into: the same ones alone and in a batch.
        padded = F.pad(waveform.float().masked_fill(~valid, 0.0), (0, self.window))
        spectrum = torch.stft(
            padded, self.window, self.hop, window=self.hann, return_complex=True, pad_mode="reflect", center=True
        )
        n_frames = self.n_frames(n_samples)
        mask = length_mask(n_frames, int(n_frames.max()))
        power = spectrum[..., : mask.shape[1]].abs().square()
        mel = (self.filters.T @ power).clamp(min=1e-10).log10()
        loudest = mel.masked_fill(~mask[:, None], -math.inf).amax(dim=(1, 2), keepdim=True)
        mel = (torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0
        return mel * mask[:, None], mask


class LogMelBackbone(SpeechBackbone):
    """The plain log-mel spectrogram, 100 frames a second, nothing learned: what pretraining must beat."""

    n_layers, dim, hop, max_samples = 1, 80, LogMel.hop, 60 * SAMPLE_RATE

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel(self.dim)

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return self.log_mel.n_frames(n_samples)

    def layers(self, waveform: Tensor, n_samples: Tensor) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        mel, mask = self.log_mel(waveform, n_samples)
        return mel.transpose(1, 2)[:, None], mask


class WhisperBackbone(SpeechBackbone):
    """Whisper's encoder, 50 frames a second: the convolutions' output and that of every transformer layer.

    transformers' own forward takes 30 s exactly and no mask; here the input is cut to the clip. The positions are
    sinusoids, so a slice of their table is exact, and at 30 s both agree.
    """

    def __init__(self, encoder: WhisperEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.log_mel = LogMel(encoder.config.num_mel_bins)
        self.n_layers = encoder.config.encoder_layers + 1
        self.dim = encoder.config.d_model
        self.hop = 2 * LogMel.hop
        self.max_samples = encoder.config.max_source_positions * self.hop

    def set_trainable(self, trainable: bool) -> None:
        super().set_trainable(trainable)
        self.encoder.embed_positions.requires_grad_(False)  # sinusoids; trained, a crop's would no longer fit the rest

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return (self.log_mel.n_frames(n_samples) + 1) // 2  # conv2: kernel 3, stride 2, padding 1

    def layers(self, waveform: Tensor, n_samples: Tensor) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        mel, mel_mask = self.log_mel(waveform, n_samples)
        mask = length_mask(self.n_frames(n_samples), (mel_mask.shape[1] + 1) // 2)
        hidden = F.gelu(self.encoder.conv1(mel)) * mel_mask[:, None]
        hidden = F.gelu(self.encoder.conv2(hidden)).transpose(1, 2) * mask[..., None]
        hidden = hidden + self.encoder.embed_positions.weight[: hidden.shape[1]]
        attend = None if bool(mask.all()) else mask[:, None, None]  # (B, 1, 1, T), True = may be looked at
        outputs = [hidden]
        for layer in self.encoder.layers:
            hidden = layer(hidden, attend)
            outputs.append(hidden)
        outputs[-1] = self.encoder.layer_norm(outputs[-1])
        return torch.stack(outputs, dim=1) * mask[:, None, :, None], mask


def _whisper_from_ctranslate2(variables: dict[str, Tensor]) -> WhisperBackbone:
    """CTranslate2 names -> transformers' WhisperEncoder; q, k and v come fused, and k has no bias."""
    shape = {name: tuple(value.shape) for name, value in variables.items()}
    width, n_mels, _ = shape["encoder/conv1/weight"]
    n_layers = len({name.split("/")[1] for name in variables if name.startswith("encoder/layer_") and "ffn" in name})
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=n_mels,
        encoder_layers=n_layers,
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=shape["encoder/layer_0/ffn/linear_0/weight"][0],
        max_source_positions=shape["encoder/position_encodings/encodings"][0],
    )
    state = {"embed_positions.weight": variables["encoder/position_encodings/encodings"]}

    def put(target: str, source: str) -> None:
        for ours, theirs in (("weight", "gamma"), ("bias", "beta"), ("weight", "weight"), ("bias", "bias")):
            if f"encoder/{source}/{theirs}" in variables:
                state[f"{target}.{ours}"] = variables[f"encoder/{source}/{theirs}"]

    put("conv1", "conv1"), put("conv2", "conv2"), put("layer_norm", "layer_norm")
    for i in range(n_layers):
        put(f"layers.{i}.self_attn_layer_norm", f"layer_{i}/self_attention/layer_norm")
        put(f"layers.{i}.self_attn.out_proj", f"layer_{i}/self_attention/linear_1")
        put(f"layers.{i}.final_layer_norm", f"layer_{i}/ffn/layer_norm")
        put(f"layers.{i}.fc1", f"layer_{i}/ffn/linear_0")
        put(f"layers.{i}.fc2", f"layer_{i}/ffn/linear_1")
        fused = f"encoder/layer_{i}/self_attention/linear_0/"
        for name, weight, bias in zip(
            "qkv", variables[fused + "weight"].chunk(3), variables[fused + "bias"].chunk(3), strict=True
        ):
            state[f"layers.{i}.self_attn.{name}_proj.weight"] = weight
            if name != "k":
                state[f"layers.{i}.self_attn.{name}_proj.bias"] = bias
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(state, strict=True)
    return WhisperBackbone(encoder)


def load_speech_backbone(name: str) -> SpeechBackbone:
    """A speech backbone in eval mode, on the CPU, all parameters frozen.

    Args:
        name: `whisper-tiny` (the default; English-only weights), `logmel`, or the hub id or folder of a Whisper model.

    Raises:
        weights.WeightsError: not found, damaged, or a kind that is not supported.
    """
    if name == "logmel":
        return LogMelBackbone().eval()
    folder = weights.find(name)
    if (folder / "model.bin").is_file():
        file = folder / "model.bin"
        try:
            backbone = _whisper_from_ctranslate2(weights.read_ctranslate2(file))
        except (KeyError, ValueError, RuntimeError) as error:
            raise weights.WeightsError(f"{file} is no whole Whisper model: {error}") from None
    else:
        kind = weights.model_type(folder)
        if kind != "whisper":
            raise weights.WeightsError(f"{folder} holds a {kind!r} model; speech backbones here are: whisper, logmel")
        backbone = WhisperBackbone(weights.load_pretrained(WhisperModel, folder).encoder)
    backbone.set_trainable(False)
    return backbone.eval()
