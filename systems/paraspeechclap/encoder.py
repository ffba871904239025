"""ParaSpeechCLAP (Diwan et al. 2026), combined: WavLM Large and Granite embeddings, trained on ParaSpeechCaps.

    git clone https://github.com/ajd12342/paraspeechclap
    python3.10 -m venv ps && ps/bin/pip install -r systems/paraspeechclap/requirements.txt
    ps/bin/huggingface-cli download ajd12342/paraspeechclap-combined paraspeechclap-combined.pth.tar --local-dir .
    ps/bin/python systems/embed.py paraspeechclap --repository paraspeechclap \
        --checkpoint paraspeechclap-combined.pth.tar --manifest …/manifest.csv --split test --captions captions.csv

Code: MIT; its checkpoints' terms are on their model cards. -intrinsic and -situational go the same way (give --out).
The towers' configurations and tokeniser come from the hub: microsoft/wavlm-large and
ibm-granite/granite-embedding-278m-multilingual.

Written from the repository's source; it has not been run with the real weights, which were not to be had where it was
written.
"""

import sys

CHECKPOINT = ""
LICENCE = "MIT (code); weights as on their model card"
RATE = 16_000
WINDOW_S = 30.0
SPEECH, TEXT = "microsoft/wavlm-large", "ibm-granite/granite-embedding-278m-multilingual"


def load(checkpoint, repository, device):
    sys.path.insert(0, repository)
    import torch
    from paraspeechclap.model import CLAP
    from transformers import AutoTokenizer, Wav2Vec2FeatureExtractor

    model = CLAP(speech_name=SPEECH, text_name=TEXT, embedding_dim=768)
    found = model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True), strict=False)
    lost = [name for name in found.missing_keys if name in dict(model.named_parameters())]
    if lost:
        raise SystemExit(f"{checkpoint} lacks {len(lost)} weights of ParaSpeechCLAP: {', '.join(lost[:3])}")
    model = model.to(device).eval()
    features, tokens = Wav2Vec2FeatureExtractor.from_pretrained(SPEECH), AutoTokenizer.from_pretrained(TEXT)

    @torch.no_grad()
    def audio(waveform):
        inputs = features(waveform, sampling_rate=RATE, return_tensors="pt").input_values.to(device)
        return model.get_audio_embedding(inputs, normalize=True)[0].cpu().numpy()

    @torch.no_grad()
    def text(captions):
        inputs = tokens(captions, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
        return model.get_text_embedding(inputs, normalize=True).cpu().numpy()

    return audio, text
