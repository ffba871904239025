"""emotion2vec: funasr's model class and config, its weights read by us, run by a forward of our own.

funasr's own loader unpickles, its forward does not normalise the waveform, and through its convolutions a clip sees the
padding of its batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn import functional as F

from esr_utils import weights
from esr_utils.speech.convolutions import ConvLayer, conv_stack, grouped_conv
from esr_utils.speech.funasr_classes import funasr_modules, quiet
from esr_utils.speech.kernels import dropout, linear
from esr_utils.speech.transformer import ConvTransformer, TransformerLayer


class Emotion2vecBackbone(ConvTransformer):
    """emotion2vec (Ma et al. 2024), which is built as data2vec 2.0 (Baevski et al. 2023), 50 frames a second.

    The layers are the frames that enter the transformer, then the output of each block of its prenet and its trunk; the
    extra tokens before a clip's frames are left out. In training mode the dropout and layer drop of the model's own
    config are active; they draw from torch's and numpy's global generators.
    """

    def __init__(self, model: nn.Module) -> None:
        encoder = model.modality_encoders["AUDIO"]
        kernels, strides = zip(*[(kernel, stride) for _, kernel, stride in encoder.feature_enc_layers], strict=True)
        n_blocks = len(encoder.context_encoder.blocks) + len(model.blocks)
        super().__init__(n_blocks, model.cfg.embed_dim, kernels, strides, encoder.modality_cfg.num_extra_tokens)
        self.model = model

    @property
    def encoder(self) -> nn.Module:
        """All before the trunk."""
        return self.model.modality_encoders["AUDIO"]

    def depth(self, parameter_name: str) -> int:
        prenet = re.match(r"model\.modality_encoders\.AUDIO\.context_encoder\.blocks\.(\d+)\.", parameter_name)
        if prenet:
            return int(prenet[1]) + 1
        trunk = re.match(r"model\.blocks\.(\d+)\.", parameter_name)
        return len(self.encoder.context_encoder.blocks) + int(trunk[1]) + 1 if trunk else 0

    def front_end(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        first, *others = [_conv_and_norm(block) for block in self.encoder.local_encoder.conv_layers]
        layers = [ConvLayer.of(conv, norm, dtype) for conv, norm in others]
        normalize = self.model.cfg.normalize

        def convolve(clip: Tensor) -> Tensor:
            return conv_stack(F.layer_norm(clip, clip.shape) if normalize else clip, first, layers)

        return convolve

    def embed(self, features: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        _, norm, projection = self.encoder.project_features
        hidden = linear(norm(features.float()).to(dtype), projection.weight, projection.bias).float()
        position = hidden
        for block in self.encoder.relative_positional_encoder[1:-1]:
            conv, norm = _conv_and_norm(block)
            position = grouped_conv(position, conv.weight, conv.bias, conv.groups, lengths, dtype)
            position = F.gelu(norm(position))
        hidden = hidden + position
        if self.n_extra:
            tokens = self.encoder.extra_tokens[0]
            hidden = torch.cat([part for clip in hidden.split(lengths) for part in (tokens, clip)])
        prenet = self.encoder.context_encoder
        return self._dropout(prenet.norm(hidden), prenet.dropout.p)

    def transformer(self, hidden: Tensor, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
        prenet = self.encoder.context_encoder
        chances = [prenet.layerdrop] * len(prenet.blocks) + [self.model.cfg.layerdrop] * len(self.model.blocks)
        alibi, scales = self._alibi(max(lengths)), self.encoder.alibi_scale
        outputs = [hidden]
        for i, (block, chance) in enumerate(zip((*prenet.blocks, *self.model.blocks), chances, strict=True)):
            hidden = outputs[-1]
            if i == len(prenet.blocks):
                hidden = self._dropout(hidden, self.model.dropout_input.p)
            if self.training and chance and np.random.random() <= chance:
                outputs.append(hidden)
                continue
            bias = None
            if alibi is not None:  # one scale a head, for all blocks or for each
                bias = alibi * scales[i if len(scales) > 1 else 0].clamp_min(0).view(-1, 1, 1)
            outputs.append(self.run(self._block, hidden, block, lengths, dtype, bias))
        return outputs

    def _block(self, hidden: Tensor, block: nn.Module, lengths: list[int], dtype: torch.dtype, bias) -> Tensor:
        attention, mlp = block.attn, block.mlp
        after = 1 - (1 - mlp.drop2.p) * (1 - block.post_mlp_dropout.p)  # the one after the other
        layer = TransformerLayer(
            n_heads=attention.num_heads,
            qkv_weight=attention.qkv.weight,
            qkv_bias=attention.qkv.bias,
            out=attention.proj,
            norm1=block.norm1,
            inner=mlp.fc1,
            outer=mlp.fc2,
            norm2=block.norm2,
            norm_first=False,
            dropout=(attention.attn_drop.p, attention.proj_drop.p, mlp.drop1.p, after) if self.training else None,
        )
        return layer(hidden, lengths, dtype, bias)

    def _alibi(self, size: int) -> Tensor | None:
        """(H, size, size): for each head -slope times the frames' distance, 0 from and to extra tokens (Press 2022)."""
        if self.encoder.get_alibi_bias is None:
            return None
        scale, n_heads = self.encoder.alibi_scale, self.encoder.modality_cfg.num_alibi_heads
        of_two = self.encoder.get_alibi_bias(
            batch_size=1, time_steps=2, heads=n_heads, dtype=torch.float32, device=torch.device("cpu")
        )
        at = torch.arange(size - self.n_extra, device=scale.device)
        bias = of_two[0, :, 0, 1].to(scale.device)[:, None, None] * (at - at[:, None]).abs()
        return F.pad(bias, (self.n_extra, 0, self.n_extra, 0))

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p) if self.training else x


def _conv_and_norm(block: nn.Sequential) -> tuple[nn.Conv1d, nn.Module | None]:
    norm = next((one for one in block.modules() if isinstance(one, nn.LayerNorm | nn.GroupNorm)), None)
    return block[0], norm


# Loading ----------------------------------------------------------------------------------------------------

_FITTING = {"layer_norm_first": False, "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0}
_FITTING_AUDIO = {
    "learned_alibi": False,
    "learned_alibi_scale": True,
    "conv_pos_pre_ln": False,
    "local_grad_mult": 1.0,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
}


def load_emotion2vec(folder: Path) -> Emotion2vecBackbone:
    """From a folder with config.yaml and the checkpoint: that of the hub, or `model.safetensors`.

    The pretraining decoder, a teacher (`_ema`) and a classifier in the checkpoint are left out.

    Raises:
        weights.WeightsError: the config or the checkpoint is damaged, not emotion2vec's, or of a kind not supported.
    """
    conf = _read_config(folder / "config.yaml")
    file = weights.weights_file(folder)
    state = weights.read_state(file)
    # Below "d2v_model." in the fine-tuned models; the shortest prefix is the model's own, the others copies within it.
    mark = "modality_encoders.AUDIO.local_encoder.conv_layers.0.0.weight"
    prefix = min((name.removesuffix(mark) for name in state if name.endswith(mark)), key=len, default="")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        with _funasr() as model_class, torch.device("meta"):  # nothing is drawn: every weight comes from the file
            model = model_class(model_conf=conf)
    except ImportError as error:
        raise weights.WeightsError(f"emotion2vec needs funasr, which cannot be imported here: {error}") from error
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise weights.WeightsError(f"{folder / 'config.yaml'} makes no emotion2vec model: {error}") from None
    weights.load_state(model, state, file)
    return Emotion2vecBackbone(model)


def _read_config(file: Path) -> dict:
    """funasr's `model_conf`, without the pretraining decoder."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
        conf = config["model_conf"]
        audio = conf["modalities"]["audio"]
        kind, spec = config["model"], str(audio["feature_encoder_spec"])
        n_heads, n_alibi_heads = conf["num_heads"], audio["num_alibi_heads"]
    except Exception as error:  # the parser raises many kinds
        raise weights.WeightsError(f"{file} is not emotion2vec's: {type(error).__name__}: {error}") from None
    if kind != "Emotion2vec":
        raise weights.WeightsError(f"{file} is of a {kind!r}; only Emotion2vec is known here")
    # funasr evaluates this string as Python: only lists and tuples of numbers, added and repeated, get there.
    if not re.fullmatch(r"[\[\](),\d\s]+(?:[+*][\[\](),\d\s]+)*", spec):
        raise weights.WeightsError(f"{file}: feature_encoder_spec is no list of (dim, kernel, stride): {spec!r}")
    wrong = {k: conf.get(k) for k, v in _FITTING.items() if conf.get(k, v) != v}
    wrong |= {k: audio.get(k) for k, v in _FITTING_AUDIO.items() if audio.get(k, v) != v}
    if n_heads != n_alibi_heads:
        wrong["num_alibi_heads"] = n_alibi_heads
    if wrong:
        raise weights.WeightsError(f"{file}: models with {wrong} are not supported")
    audio["decoder"] = None
    return conf


@contextmanager
def _funasr() -> Iterator[type]:
    """funasr's Emotion2vec class, within the context, quietly, and without the rest of funasr."""
    with funasr_modules("models.emotion2vec.model") as (module,), quiet():
        yield module.Emotion2vec
