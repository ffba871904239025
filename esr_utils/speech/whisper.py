"""Whisper's encoder, from transformers' weights or CTranslate2's."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from esr_utils import weights
from esr_utils.speech.interface import SpeechBackbone, length_mask
from esr_utils.speech.logmel import LogMel


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

    def depth(self, parameter_name: str) -> int:
        layer = re.match(r"encoder\.layers\.(\d+)\.", parameter_name)
        if layer:
            return int(layer[1]) + 1
        return self.n_layers - 1 if parameter_name.startswith("encoder.layer_norm.") else 0

    def layers(self, waveform: Tensor, n_samples: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        with torch.autocast(waveform.device.type, enabled=False):  # a spectrogram in half precision is a poor one
            mel, mel_mask = self.log_mel(waveform, n_samples)
        mask = length_mask(self.n_frames(n_samples), (mel_mask.shape[1] + 1) // 2)
        hidden = self.run(self._convolve, mel, mel_mask, mask)
        attend = None if bool(mask.all()) else mask[:, None, None]  # (B, 1, 1, T), True = may be looked at
        outputs = [hidden]
        for layer in self.encoder.layers:
            outputs.append(self.run(layer, outputs[-1], attend))
        outputs[-1] = self.encoder.layer_norm(outputs[-1])
        frames = torch.stack(outputs[-1 if last_only else 0 :], dim=1)
        return frames * mask[:, None, :, None], mask

    def _convolve(self, mel: Tensor, mel_mask: Tensor, mask: Tensor) -> Tensor:
        """(B, n_mels, M) -> (B, T, D), what enters the transformer."""
        hidden = F.gelu(self.encoder.conv1(mel)) * mel_mask[:, None]
        hidden = F.gelu(self.encoder.conv2(hidden)).transpose(1, 2) * mask[..., None]
        return hidden + self.encoder.embed_positions.weight[: hidden.shape[1]]


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


def load_whisper(folder: Path) -> WhisperBackbone:
    """From a folder with CTranslate2's model.bin, or with a transformers model.

    Raises:
        weights.WeightsError: the model is damaged.
    """
    file = folder / "model.bin"
    if not file.is_file():
        return WhisperBackbone(weights.load_pretrained(WhisperModel, folder).encoder)
    try:
        return _whisper_from_ctranslate2(weights.read_ctranslate2(file, "encoder/"))
    except (KeyError, ValueError, RuntimeError) as error:
        raise weights.WeightsError(f"{file} is no whole Whisper model: {error}") from None
