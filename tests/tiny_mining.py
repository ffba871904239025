"""Random models of mining's stages written into folders in the form in which the real ones are published, but tiny."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torchaudio.models import HDemucs

from esr_utils.mining import funasr_models
from esr_utils.speech.funasr_classes import funasr_modules, quiet

DEMUCS = {"sources": ["vocals", "other"], "nfft": 1024, "depth": 5, "channels": 4}
WORDS = ["<blank>", "<s>", "</s>", "你", "好", "吗", "今", "天", "hello", "yes", "<unk>"]
_FRONTEND = {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10}
_SANM = {
    "output_size": 32, "attention_heads": 2, "linear_units": 32, "num_blocks": 2, "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.1, "input_layer": "pe",
    "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True, "kernel_size": 11, "sanm_shfit": 0,
    "selfattention_layer_type": "sanm",
}  # fmt: skip

CONFIGS = {
    "FsmnVADStreaming": {
        "frontend": "WavFrontendOnline", "frontend_conf": _FRONTEND | {"lfr_m": 5, "lfr_n": 1},
        "model_conf": {"sample_rate": 16000, "detect_mode": 1, "max_end_silence_time": 800},
        "encoder": "FSMN",
        "encoder_conf": {
            "input_dim": 400, "input_affine_dim": 16, "fsmn_layers": 2, "linear_dim": 16, "proj_dim": 16, "lorder": 20,
            "rorder": 0, "lstride": 1, "rstride": 0, "output_affine_dim": 16, "output_dim": 248,
        },
    },
    "BiCifParaformer": {
        "frontend": "WavFrontend", "frontend_conf": _FRONTEND | {"lfr_m": 7, "lfr_n": 6},
        "tokenizer": "CharTokenizer", "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "model_conf": {"ctc_weight": 0.0, "lsm_weight": 0.1, "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder", "encoder_conf": _SANM,
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": 2, "linear_units": 32, "num_blocks": 2, "att_layer_num": 2, "kernel_size": 11,
            "sanm_shfit": 0, "dropout_rate": 0.1, "positional_dropout_rate": 0.1,
            "self_attention_dropout_rate": 0.1, "src_attention_dropout_rate": 0.1,
        },
        "predictor": "CifPredictorV3",
        "predictor_conf": {
            "idim": 32, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45, "smooth_factor2": 0.25,
            "noise_threshold2": 0.01, "upsample_times": 3, "use_cif1_cnn": False, "upsample_type": "cnn_blstm",
        },
        "specaug": "SpecAugLFR", "specaug_conf": {"apply_time_warp": False},
    },
    "CTTransformer": {
        "tokenizer": "CharTokenizer", "tokenizer_conf": {"unk_symbol": "<unk>"},
        "model_conf": {
            "punc_list": ["<unk>", "_", "，", "。", "？", "、"], "embed_unit": 32, "att_unit": 32, "sentence_end_id": 3,
        },
        "encoder": "SANMEncoder", "encoder_conf": _SANM | {"input_size": 32},
    },
    "CAMPPlus": {
        "model_conf": {"feat_dim": 80, "embedding_size": 24, "growth_rate": 4, "bn_size": 2, "init_channels": 16},
    },
    "SenseVoiceSmall": {
        "frontend": "WavFrontend", "frontend_conf": _FRONTEND | {"lfr_m": 7, "lfr_n": 6},
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        "model_conf": {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1},
        "encoder": "SenseVoiceEncoderSmall", "encoder_conf": _SANM | {"tp_blocks": 1},
        "ctc_conf": {"dropout_rate": 0.0, "ignore_nan_grad": True},
    },
}  # fmt: skip
# Paraformer-large as "paraformer-zh" has it: with a part for hot words, of which none are given here
CONFIGS["SeacoParaformer"] = CONFIGS["BiCifParaformer"] | {
    "model_conf": CONFIGS["BiCifParaformer"]["model_conf"]
    | {"inner_dim": 32, "bias_encoder_type": "lstm", "bias_encoder_bid": False, "train_decoder": True, "NO_BIAS": 5},
    "seaco_decoder": "ParaformerSANMDecoder",
    "seaco_decoder_conf": CONFIGS["BiCifParaformer"]["decoder_conf"] | {"wo_input_layer": True},
}
FILES = {"CAMPPlus": "campplus_cn_common.bin"}  # model.pt of the others, as on the hub


def write_separator(folder: Path) -> str:
    """HDemucs, random, with a config.json that says how small it is."""
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(DEMUCS))
    save_file(HDemucs(**DEMUCS).state_dict(), folder / "model.safetensors")
    return str(folder)


def write_funasr(folder: Path, kind: str) -> str:
    """One of funasr's models, random: config.yaml, the weights, and what else it reads."""
    folder.mkdir(parents=True)
    config = {"model": kind} | CONFIGS[kind]
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    if config.get("tokenizer") == "CharTokenizer":
        (folder / "tokens.json").write_text(json.dumps(WORDS), encoding="utf-8")
    elif "tokenizer" in config:
        (folder / "chn.bpe.model").write_bytes(pieces())
    if "frontend" in config:
        width = _FRONTEND["n_mels"] * config["frontend_conf"]["lfr_m"]
        (folder / "am.mvn").write_text(cmvn(width))
    torch.manual_seed(8)
    with funasr_modules("register", *funasr_models._MODULES[kind]) as (register, *modules), quiet():
        model = built(register.tables, getattr(modules[0], kind), config, folder)
    torch.save(model.state_dict(), folder / FILES.get(kind, "model.pt"))
    return str(folder)


def built(tables, model_class: type, config: dict, folder: Path) -> nn.Module:
    """As funasr's AutoModel builds it, with biases that make a random model say something."""
    conf = {k: v for k, v in config.items() if k != "model_conf"} | config["model_conf"]
    if "tokenizer" in config:
        conf["vocab_size"] = (
            len(WORDS) if (folder / "tokens.json").exists() else sentencepieces(folder).get_piece_size()
        )
    if "frontend" in config:
        conf["input_size"] = _FRONTEND["n_mels"] * config["frontend_conf"]["lfr_m"]
    model = model_class(**{k: v for k, v in conf.items() if not k.startswith("specaug")}).eval()
    with torch.no_grad():
        if config["model"] == "CTTransformer":
            model.decoder.bias[0] = -100  # never "<unk>", which no trained model says either
        elif "Paraformer" in config["model"]:
            model.decoder.output_layer.bias[:3] = -100  # words, not blanks
            model.decoder.output_layer.bias[-1] = -100
        elif config["model"] == "SenseVoiceSmall":
            model.ctc.ctc_lo.bias[sentencepieces(folder).piece_to_id("<|HAPPY|>")] = 100
    return model


def sentencepieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "chn.bpe.model"))


def pieces() -> bytes:
    """A sentencepiece model that knows SenseVoice's tags."""
    tags = ["<|zh|>", "<|en|>", "<|HAPPY|>", "<|SAD|>", "<|EMO_UNKNOWN|>", "<|Speech|>", "<|Laughter|>", "<|withitn|>"]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello there, how are you", "kids are talking by the door", "dogs are sitting"] * 5),
        model_writer=made, vocab_size=60, user_defined_symbols=tags, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def cmvn(width: int) -> str:
    """Means and scales in the text format of Kaldi's nnets, which funasr reads."""
    shift, scale = " ".join(["-8.0"] * width), " ".join(["0.2"] * width)
    rows = [("<AddShift>", shift), ("<Rescale>", scale)]
    return "<Nnet>\n" + "".join(f"{n} {width} {width}\n<LearnRateCoef> 0 [ {v} ]\n" for n, v in rows) + "</Nnet>\n"
