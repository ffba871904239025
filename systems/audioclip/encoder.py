"""AudioCLIP (Guzhov et al. 2022), fully trained: ESResNeXt-fbsp on CLIP's text tower.

    git clone https://github.com/AndreyGuzhov/AudioCLIP
    curl -LO https://github.com/AndreyGuzhov/AudioCLIP/releases/download/v0.1/AudioCLIP-Full-Training.pt
    # its tokeniser reads AudioCLIP/assets/bpe_simple_vocab_16e6.txt.gz; the release has it too, should a clone not
    python3.10 -m venv ac && ac/bin/pip install "setuptools<81" wheel
    ac/bin/pip install --no-build-isolation -r systems/audioclip/requirements.txt
    ac/bin/python systems/embed.py audioclip --repository AudioCLIP --checkpoint AudioCLIP-Full-Training.pt \
        --manifest …/manifest.csv --split test --captions captions.csv

Code and weights: MIT. A caption of more than 77 tokens is an error in its tokeniser.

Written from the repository's source; it has not been run with the real weights, which were not to be had where it was
written.
"""

import sys

CHECKPOINT = ""
LICENCE = "MIT"
RATE = 44_100
WINDOW_S = 10.0


def load(checkpoint, repository, device):
    sys.path.insert(0, repository)  # its modules are called model and utils, and are no package
    import torch
    from model import AudioCLIP

    model = AudioCLIP(pretrained=False)
    missing = model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True), strict=False)
    lost = [name for name in missing.missing_keys if name in dict(model.named_parameters())]
    if lost:
        raise SystemExit(f"{checkpoint} lacks {len(lost)} weights of AudioCLIP: {', '.join(lost[:3])}")
    model = model.to(device).eval()

    @torch.no_grad()
    def audio(waveform):
        return model.encode_audio(torch.from_numpy(waveform).reshape(1, 1, -1)).cpu().numpy()[0]

    @torch.no_grad()
    def text(captions):
        # A list of labels per clip, which it joins by commas: one label each.
        return model.encode_text([[caption] for caption in captions]).float().cpu().numpy()

    return audio, text
