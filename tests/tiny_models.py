"""Random models written into folders in the form in which the real ones are published, small or at their real size."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from esr_utils import weights
from esr_utils.speech import emotion2vec

WAV2VEC2 = {
    "wavlm": (WavLMConfig, WavLMModel),
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
}
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_TINY = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 4, "vocab_size": 8, "initializer_range": 0.2,
    # each of them, so that a test sees which is active
    "hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "feat_proj_dropout": 0.1,
    "layerdrop": 0.1, "mask_time_prob": 0.2, "mask_time_length": 5,
}  # fmt: skip


def wav2vec2(kind: str, **settings) -> PreTrainedModel:
    """A model of transformers, of width 32 with 3 layers unless settings say otherwise, in eval mode."""
    config, model = WAV2VEC2[kind]
    torch.manual_seed(4)
    made = model(config(**(_TINY | settings))).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # norms and biases too, which start as the identity
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def write_wav2vec2(folder: Path, kind: str, **settings) -> str:
    """As safetensors."""
    with weights.quiet_transformers():
        wav2vec2(kind, **settings).save_pretrained(folder)
    return str(folder)


def as_published(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state under the names of the hub's older files, from before the parametrized weight norm."""
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = tensor
    return state


def emotion2vec_config(dim: int = 768, heads: int = 12, depth: int = 8, prenet: int = 4, conv_dim: int = 512) -> dict:
    """The settings of emotion2vec base, at this size."""
    audio = {
        "type": "AUDIO", "prenet_depth": prenet, "prenet_layerdrop": 0.05, "prenet_dropout": 0.1,
        "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "num_extra_tokens": 10, "init_extra_token_zero": True,
        "mask_noise_std": 0.01, "mask_prob": 0.5, "mask_prob_min": None, "mask_length": 5, "mask_dropout": 0.0,
        "inverse_mask": False, "keep_masked_pct": 0.0, "add_masks": False, "encoder_zero_mask": True,
        "mask_channel_prob": 0.0, "mask_channel_length": 64, "local_grad_mult": 1.0, "use_alibi_encoder": True,
        "alibi_scale": 1.0, "learned_alibi": False, "alibi_max_pos": None, "learned_alibi_scale": True,
        "learned_alibi_scale_per_head": True, "learned_alibi_scale_per_layer": False, "num_alibi_heads": heads,
        "model_depth": depth, "extractor_mode": "layer_norm",
        "feature_encoder_spec": f"[({conv_dim}, 10, 5)] + [({conv_dim}, 3, 2)] * 4 + [({conv_dim},2,2)] * 2",
        "conv_pos_width": 95, "conv_pos_groups": 16, "conv_pos_depth": 5, "conv_pos_pre_ln": False,
        "decoder": {
            "decoder_dim": 384, "decoder_groups": 16, "decoder_kernel": 7, "decoder_layers": 4, "input_dropout": 0.1,
            "add_positions_masked": False, "add_positions_all": False, "decoder_residual": True,
            "projection_layers": 1, "projection_ratio": 2.0,
        },
    }  # fmt: skip
    conf = {
        "depth": depth, "num_heads": heads, "embed_dim": dim, "mlp_ratio": 4.0, "norm_eps": 1e-5, "norm_affine": True,
        "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "encoder_dropout": 0.1, "post_mlp_drop": 0.1,
        "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.0, "layerdrop": 0.05,
        "layer_norm_first": False, "average_top_k_layers": depth, "end_of_block_targets": False, "clone_batch": 8,
        "loss_beta": 0.0, "loss_scale": None, "normalize": True, "modalities": {"audio": audio},
    }  # fmt: skip
    return {"model": "Emotion2vec", "model_conf": conf}


TINY_EMOTION2VEC = {"dim": 32, "heads": 4, "depth": 2, "prenet": 1, "conv_dim": 16}


def emotion2vec_model(config: dict) -> nn.Module:
    """funasr's own model, pretraining decoder and all, in eval mode."""
    torch.manual_seed(5)
    with emotion2vec._funasr() as model_class:
        model = model_class(model_conf=copy.deepcopy(config["model_conf"])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for block in (*model.blocks, *model.modality_encoders["AUDIO"].context_encoder.blocks):
            block.attn.qkv.weight.mul_(10 / math.sqrt(len(block.norm1.weight)))  # so that attention is not even
        model.modality_encoders["AUDIO"].alibi_scale[:, :, 0] = -0.5  # training may get there; it counts as 0
    return model


def write_emotion2vec(folder: Path, config: dict, model: nn.Module, file: str = "emotion2vec_base.pt") -> str:
    """As the hub has it: config.yaml, and a checkpoint in which the model is one of several entries."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"model": model.state_dict(), "epoch": 1, "scale": torch.zeros(1, dtype=torch.float64)}, folder / file)
    return str(folder)


def write_clap(folder: Path, sentences: list[str], **audio) -> str:
    """A CLAP of LAION's shape, both sides, with its tokenizer and feature extractor: 128 frames of 32 in 10 s."""
    tokenizer, vocab = byte_level(sentences)
    sizes = {
        "spec_size": 256, "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 1], "num_hidden_layers": 2,
        "num_attention_heads": [2, 2], "initializer_factor": 4.0,
    }  # fmt: skip
    text = {
        "vocab_size": len(vocab), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
        "initializer_factor": 8.0,
    }  # fmt: skip
    torch.manual_seed(7)
    model = ClapModel(ClapConfig(text_config=text, audio_config=sizes | audio, projection_dim=8))
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.copy_(-30 + 5 * torch.randn(64)), norm.running_var.copy_(200 + 100 * torch.rand(64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    with weights.quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return str(folder)


# Text -------------------------------------------------------------------------------------------------------


def byte_level(sentences: list[str]) -> tuple[RobertaTokenizer, dict[str, int]]:
    """RoBERTa's kind of tokenizer that knows these sentences, and its vocabulary."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences, vocab_size=300, special_tokens=special, show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    return RobertaTokenizer(vocab=state["vocab"], merges=merges, model_max_length=512), state["vocab"]


def write_text(folder: Path, kind: str, sentences: list[str]) -> str:
    """A bert, roberta, t5 or flan-t5 of width 16 with the kind of tokenizer that it has, which knows these sentences.

    Its dropout is high, so that a model left in train mode is noticed.
    """
    torch.manual_seed(6)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "initializer_range": 0.5}
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = sorted({word for s in sentences for word in re.findall(r"\w+|[^\w\s]", s.lower())})
        vocab = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = BertTokenizer(vocab=vocab, model_max_length=512)
        model = BertModel(BertConfig(vocab_size=len(vocab), **sizes, **dropout))
    elif kind == "roberta":
        tokenizer, vocab = byte_level(sentences)
        config = RobertaConfig(
            vocab_size=len(vocab), max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, **sizes, **dropout,
        )  # fmt: skip
        model = RobertaModel(config)
    else:
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        pieces += [(f"▁{word}", -3.0) for word in sorted({word for s in sentences for word in s.split()})]
        pieces += [(letter, -6.0) for letter in sorted({letter for s in sentences for letter in s} | {"▁"})]
        tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)  # states no limit
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "flan-t5" else {}
        config = T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.5,
            initializer_factor=3.0, **gated,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    with weights.quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
