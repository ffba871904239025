"""MGA-CLAP (Li et al. 2024) as published: HTSAT and BERT, pooled by a shared codebook.

    git clone https://github.com/Ming-er/MGA-CLAP    # its README links the checkpoint, on Google Drive
    python3.10 -m venv mga && mga/bin/pip install -r systems/mga-clap/requirements.txt
    mga/bin/python systems/embed.py mga-clap --repository MGA-CLAP --checkpoint model.pt \
        --manifest …/manifest.csv --split test --captions captions.csv

Code: MIT. Its text tower's tokeniser and configuration (bert-base-uncased) come from the hub. Text is cut at 30 tokens.
Its sparsemax makes a tensor on "cuda" unless told otherwise, so on a CPU it is told.

Written from the repository's source; it has not been run with the real weights, which were not to be had where it was
written.
"""

import functools
import sys
from pathlib import Path

CHECKPOINT = ""
LICENCE = "MIT (code); the checkpoint states none"
RATE = 32_000
WINDOW_S = 10.0


def load(checkpoint, repository, device):
    sys.path.insert(0, repository)  # models and tools are no package
    import torch
    import yaml
    from models.ase_model import ASE

    settings = yaml.safe_load((Path(repository) / "settings" / "inference_example.yaml").read_text())
    settings["device"] = device
    model = ASE(settings)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"], strict=True)
    model = model.to(device).eval()
    sparsemax = model.msc.attn_activation
    sparsemax.forward = functools.partial(sparsemax.forward, device=device)

    @torch.no_grad()
    def audio(waveform):
        _, frames = model.encode_audio(torch.from_numpy(waveform)[None].to(device))
        return model.msc(frames, model.codebook)[0].cpu().numpy()

    @torch.no_grad()
    def text(captions):
        _, words, mask = model.encode_text(captions)
        return model.msc(words, model.codebook, mask).cpu().numpy()

    return audio, text
