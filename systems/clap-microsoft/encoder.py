"""CLAP-Microsoft 2023 (Elizalde et al., "Natural Language Supervision for General-Purpose Audio Representations").

    python3.10 -m venv ms && ms/bin/pip install -r systems/clap-microsoft/requirements.txt
    ms/bin/python systems/embed.py clap-microsoft --manifest …/manifest.csv --split test --captions captions.csv

Its package msclap (MIT) fetches its weights from the hub (microsoft/msclap, CLAP_weights_2023.pth); --checkpoint takes
a local copy. It reads them by torch.load, which from torch 2.6 on takes tensors only. It takes files and 7 s: a shorter
clip is repeated to 7 s by the package, a longer one comes in windows. Captions may have 77 tokens.

Written from the package's source, version 1.3.4; it has not been run with the real weights, which were not to be had
where it was written.
"""

import tempfile
from pathlib import Path

CHECKPOINT = "microsoft/msclap CLAP_weights_2023.pth"
LICENCE = "MIT"
RATE = 44_100
WINDOW_S = 7.0


def load(checkpoint, repository, device):
    import soundfile
    from msclap import CLAP

    fetched = checkpoint == CHECKPOINT
    model = CLAP(None if fetched else checkpoint, version="2023", use_cuda=device.startswith("cuda"))

    def audio(waveform):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "clip.wav")
            soundfile.write(path, waveform, RATE, subtype="FLOAT")
            return model.get_audio_embeddings([path], resample=True)[0].cpu().numpy()

    def text(captions):
        return model.get_text_embeddings(captions).cpu().numpy()

    return audio, text
