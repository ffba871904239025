"""WavLM, HuBERT and wav2vec 2.0: transformers' weights, run by a forward of our own.

transformers pads a batch, and the base models' group norm over time and the convolutions see the padding: an attention
mask does not help. Here each clip goes through what looks sideways alone (`kernels`), so that its frames are those of
transformers' forward on that clip, unpadded, and not dependent on the batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HubertModel, PreTrainedModel, Wav2Vec2Model, WavLMModel

from esr_utils import weights
from esr_utils.speech.convolutions import ConvLayer, conv_stack, grouped_conv
from esr_utils.speech.interface import length_mask
from esr_utils.speech.kernels import dropout, linear, unpack
from esr_utils.speech.transformer import ConvTransformer, TransformerLayer

KINDS = {"wavlm": WavLMModel, "hubert": HubertModel, "wav2vec2": Wav2Vec2Model}


class Wav2Vec2Backbone(ConvTransformer):
    """The family of wav2vec 2.0 (Baevski et al. 2020), 50 frames a second.

    The layers are those of transformers' `output_hidden_states`: the frames that enter the transformer, then the output
    of each of its layers, the last after the final norm where the model has one. In training mode the dropout, layer
    drop and SpecAugment of the model's own config are active; they draw from torch's and numpy's global generators.
    """

    def __init__(self, model: PreTrainedModel, normalize: bool) -> None:
        """`normalize`: each waveform to zero mean and unit variance first, as the model was trained."""
        config = model.config
        super().__init__(config.num_hidden_layers, config.hidden_size, config.conv_kernel, config.conv_stride)
        self.model = model
        self.normalize = normalize

    def depth(self, parameter_name: str) -> int:
        layer = re.match(r"model\.encoder\.layers\.(\d+)\.", parameter_name)
        if layer:
            return int(layer[1]) + 1
        final_norm = self.model.config.do_stable_layer_norm and parameter_name.startswith("model.encoder.layer_norm.")
        return self.n_layers - 1 if final_norm else 0

    def front_end(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        blocks = self.model.feature_extractor.conv_layers
        first, *others = [(one.conv, getattr(one, "layer_norm", None)) for one in blocks]
        layers = [ConvLayer.of(conv, norm, dtype) for conv, norm in others]

        def convolve(clip: Tensor) -> Tensor:
            if self.normalize:
                clip = (clip - clip.mean()) / (clip.var(correction=0) + 1e-7).sqrt()
            return conv_stack(clip, first, layers)

        return convolve

    def embed(self, features: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        projection, config = self.model.feature_projection, self.model.config
        hidden = features.float()
        if getattr(config, "feat_proj_layer_norm", True):
            hidden = projection.layer_norm(hidden)
        hidden = linear(hidden.to(dtype), projection.projection.weight, projection.projection.bias).float()
        if self.training:
            hidden = self._spec_augment(dropout(hidden, config.feat_proj_dropout), lengths)
        conv = self.model.encoder.pos_conv_embed.conv
        hidden = hidden + F.gelu(grouped_conv(hidden, conv.weight, conv.bias, conv.groups, lengths, dtype))
        if not config.do_stable_layer_norm:
            hidden = self.model.encoder.layer_norm(hidden)
        return dropout(hidden, config.hidden_dropout) if self.training else hidden

    def _spec_augment(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """The model's own masking of spans (Park et al. 2019), by which it was pretrained; not of a batch too short."""
        config = self.model.config
        if not config.apply_spec_augment or max(lengths) < config.mask_time_length:
            return hidden
        mask = length_mask(torch.tensor(lengths, device=hidden.device), max(lengths))
        return self.model._mask_hidden_states(unpack(hidden, lengths), attention_mask=mask)[mask]

    def transformer(self, hidden: Tensor, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
        encoder, config = self.model.encoder, self.model.config
        bias = self._position_bias(max(lengths))
        outputs = [hidden]
        for i, layer in enumerate(encoder.layers):
            first = i == 0 and bias is not None  # WavLM never drops the layer that owns the position bias
            if self.training and config.layerdrop and not first and float(torch.rand([])) < config.layerdrop:
                outputs.append(outputs[-1])
            else:
                outputs.append(self.run(self._layer, outputs[-1], layer, lengths, dtype, bias))
        if config.do_stable_layer_norm:
            outputs[-1] = encoder.layer_norm(outputs[-1])
        return outputs

    def _layer(
        self, hidden: Tensor, layer: nn.Module, lengths: list[int], dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        attention, ffn, config = layer.attention, layer.feed_forward, self.model.config
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        p_hidden = config.hidden_dropout
        dropouts = (config.attention_dropout, p_hidden, config.activation_dropout, p_hidden)
        whole = TransformerLayer(
            n_heads=attention.num_heads,
            qkv_weight=torch.cat([one.weight for one in projections]),
            qkv_bias=torch.cat([one.bias for one in projections]),
            out=attention.out_proj,
            norm1=layer.layer_norm,
            inner=ffn.intermediate_dense,
            outer=ffn.output_dense,
            norm2=layer.final_layer_norm,
            norm_first=config.do_stable_layer_norm,
            dropout=dropouts if self.training else None,
        )
        gate = None if bias is None else lambda x: _gate(x, attention)
        return whole(hidden, lengths, dtype, bias, gate)

    def _position_bias(self, size: int) -> Tensor | None:
        """WavLM's (H, size, size): for each head a number by the bucket of j - i (Chen et al. 2022)."""
        attention = self.model.encoder.layers[0].attention
        if not hasattr(attention, "rel_attn_embed"):
            return None
        distance = torch.arange(1 - size, size, device=attention.rel_attn_embed.weight.device)
        by_distance = attention.rel_attn_embed(attention._relative_positions_bucket(distance)).T
        return by_distance.unfold(1, size, 1).flip(1)  # row i begins at distance -i


def _gate(x: Tensor, attention: nn.Module) -> Tensor:
    """How much each frame heeds WavLM's position bias, (H, N): its gated relative position bias (Chen et al. 2022)."""
    n_heads, gates = attention.num_heads, attention.gru_rel_pos_linear
    # The model adds up four outputs for each gate, which is one linear map with the sum of their weights.
    weight, bias = gates.weight.view(2, 4, -1).sum(1), gates.bias.view(2, 4).sum(1)
    update, reset = linear(x.view(len(x) * n_heads, -1), weight, bias).float().sigmoid().view(-1, n_heads, 2).unbind(-1)
    return (update * (reset * attention.gru_rel_pos_const.view(-1) - 1.0) + 2.0).T.contiguous()


def load_wav2vec2(folder: Path, kind: str) -> Wav2Vec2Backbone:
    """From a folder with a transformers model of one of KINDS.

    Raises:
        weights.WeightsError: the model is damaged, or has parts that are not supported.
    """
    model = weights.load_pretrained(KINDS[kind], folder)
    config = model.config
    unsupported = {
        "add_adapter": getattr(config, "add_adapter", False),
        "adapter_attn_dim": getattr(config, "adapter_attn_dim", None),
        "conv_pos_batch_norm": getattr(config, "conv_pos_batch_norm", False),
        "hidden_act": config.hidden_act if config.hidden_act != "gelu" else None,
        "feat_extract_activation": config.feat_extract_activation if config.feat_extract_activation != "gelu" else None,
    }
    if found := {name: value for name, value in unsupported.items() if value}:
        raise weights.WeightsError(f"{folder / 'config.json'}: models with {found} are not supported")
    return Wav2Vec2Backbone(model, _normalizes(folder, config))


def _normalizes(folder: Path, config) -> bool:
    """As preprocessor_config.json says; without one, as its authors had it: the models without group norm were."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return config.feat_extract_norm == "layer"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["do_normalize"])
    except (ValueError, KeyError, TypeError) as error:
        raise weights.WeightsError(f"{file} does not say whether waveforms are normalised: {error!r}") from None
