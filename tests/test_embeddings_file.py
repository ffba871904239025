"""Other systems' vectors: written, read and refused; and the program that writes them, run on real clips."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from safetensors.numpy import save

from esr_utils import batches, embeddings_file, manifests, runs
from esr_utils.embeddings_file import ABOUT, SYSTEMS, VECTORS, EmbeddingsFile, EmbeddingsFileError, what_to_run

EMBED = runs.PROJECT / "systems" / "embed.py"


def some(**changes) -> EmbeddingsFile:
    values = {
        "system": "toy",
        "checkpoint": "toy-1",
        "licence": "MIT",
        "level": "normalised",
        "utterance_ids": ["c/0", "c/1", "c/2"],
        "captions": ["loud", "quiet"],
        "utterance_vectors": np.array([[3, 0], [0, 0.5], [1, 1]], dtype=np.float32),
        "caption_vectors": np.array([[2, 0], [-4, 3]], dtype=np.float32),
    }
    return EmbeddingsFile(**{**values, **changes})


def test_written_and_read_the_scores_are_cosines_in_the_order_asked_for(tmp_path):
    some().write(tmp_path / "toy")
    found = EmbeddingsFile.read(tmp_path / "toy")
    # loud (1, 0), quiet (-4/5, 3/5); clip 2 (1, 1)/sqrt 2, clip 0 (1, 0)
    expected = [[(-0.8 + 0.6) / 2**0.5, -0.8], [1 / 2**0.5, 1.0]]
    np.testing.assert_allclose(found.scores(["quiet", "loud"], ["c/2", "c/0"]), expected, atol=1e-6)
    assert (found.system, found.checkpoint, found.licence, found.level) == ("toy", "toy-1", "MIT", "normalised")
    assert json.loads((tmp_path / "toy" / ABOUT).read_text())["protocol"] == "bi-encoder"
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == [ABOUT, VECTORS]


def test_tiny_and_huge_vectors_keep_their_direction():
    small = some(
        utterance_vectors=np.full((3, 2), 1e-30, np.float32), caption_vectors=np.full((2, 2), 1e30, np.float32)
    )
    np.testing.assert_allclose(small.scores(["loud"], ["c/1"]), 1, atol=1e-6)


def test_what_is_missing_is_named():
    with pytest.raises(
        EmbeddingsFileError, match="toy: 2 of 3 clips are not in the file: 'c/8', 'c/9'; run its script"
    ):
        some().scores(["loud"], ["c/8", "c/0", "c/9"])
    with pytest.raises(EmbeddingsFileError, match="5 of 5 captions are not .*'0', '1', '2' and 2 more"):
        some().scores(list("01234"), ["c/0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"utterance_ids": ["c/0", "c/1", "c/1"]}, "utterance 'c/1' more than once"),
        ({"captions": ["loud", "loud"]}, "caption 'loud' more than once"),
        ({"utterance_ids": ["c/0"]}, "1 utterance names for 3 vectors"),
        ({"caption_vectors": np.ones((2, 3), np.float32)}, "utterances have 2 dimensions, captions 3"),
        ({"caption_vectors": np.ones((2, 2))}, "caption vectors are float64"),
        ({"utterance_vectors": np.array([[1, 0], [0, 0], [np.nan, 1]], np.float32)}, "finite: 'c/2'; .*zeros: 'c/1'"),
        ({"licence": ""}, "licence is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(change, message):
    with pytest.raises(EmbeddingsFileError, match=f"embeddings of toy: .*{message}"):
        some(**change)


def changed(folder: Path, **values) -> None:
    about = json.loads((folder / ABOUT).read_text()) | values
    (folder / ABOUT).write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "format is 2, not 1"),
        ({"licence": None}, "licence missing or of the wrong type"),
        ({"captions": ["loud", 3]}, "captions must hold texts only"),
        ({"protocol": "matched"}, "protocol is 'matched'"),
        ({"sha256": "0" * 64}, "sha256 differs"),
        ({"captions": ["loud"]}, "1 caption names for 2 vectors"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, values, message):
    some().write(tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(EmbeddingsFileError, match=message):
        EmbeddingsFile.read(tmp_path)


def test_damaged_tensors_are_refused(tmp_path):
    some().write(tmp_path)
    whole = (tmp_path / VECTORS).read_bytes()
    (tmp_path / VECTORS).write_bytes(whole[:-4])
    with pytest.raises(EmbeddingsFileError, match="sha256 differs"):
        EmbeddingsFile.read(tmp_path)
    for content in (b"not tensors", save({"utterances": np.ones((3, 2), np.float32)})):
        (tmp_path / VECTORS).write_bytes(content)
        changed(tmp_path, sha256=embeddings_file.hashlib.sha256(content).hexdigest())
        with pytest.raises(EmbeddingsFileError, match="write it again"):
            EmbeddingsFile.read(tmp_path)
    (tmp_path / ABOUT).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        EmbeddingsFile.read(tmp_path)


def test_where_a_file_is_not_there_the_row_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not run: python systems/embed.py mga-clap"):
        EmbeddingsFile.read(tmp_path / "mga-clap")
    with pytest.raises(FileNotFoundError, match="no embeddings file in .*toy$"):
        EmbeddingsFile.read(tmp_path / "toy")
    for system in SYSTEMS:
        assert (runs.PROJECT / "systems" / system / "encoder.py").is_file() and f" {system} " in what_to_run(system)
    assert sorted(folder.parent.name for folder in EMBED.parent.glob("*/encoder.py")) == sorted(SYSTEMS)
    with pytest.raises(ValueError, match="'toy'; there are scripts for clap-microsoft"):
        what_to_run("toy")


# The program that writes them -------------------------------------------------------------------------------

# A small encoder of real sound: the energies of 12 bands; a sentence is the counts of its letters in 12 groups.
ENCODER = '''
"""Bands of the spectrum, for tests."""
import numpy as np

CHECKPOINT, LICENCE, RATE, WINDOW_S = "none", "CC0", 8000, 1.0


def load(checkpoint, repository, device):
    def audio(waveform):
        assert waveform.dtype == np.float32 and len(waveform) <= RATE * WINDOW_S
        return [band.mean() for band in np.array_split(np.abs(np.fft.rfft(waveform, 8000))[1:], 12)]

    def text(captions):
        return [[1 + sum(ord(c) % 12 == k for c in caption) for k in range(12)] for caption in captions]

    return audio, text
'''


@pytest.fixture(scope="module")
def embed():
    spec = importlib.util.spec_from_file_location("embed", EMBED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    (tmp_path / "bands").mkdir()
    (tmp_path / "bands" / "encoder.py").write_text(ENCODER)
    pd.DataFrame({"caption": ["A shout.", " A whisper. ", "A shout.", ""]}).to_csv(
        tmp_path / "captions.csv", index=False
    )
    return tmp_path / "bands" / "encoder.py"


def test_clips_and_captions_become_a_file_that_can_be_scored(embed, bands, data_root, manifest, tmp_path, capsys):
    given = ["--manifest", str(data_root / "mini" / "manifest.csv"), "--captions", str(tmp_path / "captions.csv")]
    embed.main([str(bands), *given, "--split", "test", "--out", str(tmp_path / "out")])
    found = EmbeddingsFile.read(tmp_path / "out")
    test = manifest[manifest["split"] == "test"]
    assert found.utterance_ids == test["utterance_id"].tolist() and found.captions == ["A shout.", "A whisper."]
    assert (found.system, found.checkpoint, found.licence) == ("bands", "none", "CC0")
    assert "18 of 18 clips, 2 captions, 12 dimensions" in capsys.readouterr().err
    # One clip by hand: the mean of its windows' unit vectors.
    row = test.iloc[3]
    sound = embed.waveform(Path(row["root"]) / row["path"], {}, 8000, "normalised")
    audio, text = embed.encoder(str(bands))[0].load("", "", "")
    pieces = [np.asarray(audio(piece)) for piece in np.array_split(sound, int(np.ceil(len(sound) / 8000)))]
    assert len(pieces) > 1
    vector = np.mean([piece / np.linalg.norm(piece) for piece in pieces], axis=0)
    caption = np.asarray(text(["A whisper."])[0])
    cosine = vector @ caption / np.linalg.norm(vector) / np.linalg.norm(caption)
    assert found.scores(["A whisper."], [row["utterance_id"]])[0, 0] == pytest.approx(cosine, abs=1e-5)


def test_it_hears_what_our_own_systems_hear(embed, manifest):
    """Level, range, channel and rate as in `batches`."""
    assert (embed.TARGET_DBFS, embed.SILENCE_DBFS) == (batches.TARGET_DBFS, batches.SILENCE_DBFS)
    assert embed.MIN_SECONDS == batches.MIN_SECONDS
    assert (embed.FORMAT, embed.PROTOCOL) == (embeddings_file.FORMAT, embeddings_file.PROTOCOL)
    rows = manifest.head(2).assign(start_s=[0.25, np.nan], end_s=[0.75, np.nan])
    rows.loc[0, "duration_s"] = 0.5
    for (_, row), cut in zip(rows.iterrows(), manifests.to_cuts(rows), strict=True):
        for level in ("normalised", "recorded"):
            ours = batches.load_waveform(cut, level).numpy()
            ranged = {} if pd.isna(row["start_s"]) else {"start_s": "0.25", "end_s": "0.75"}
            theirs = embed.waveform(Path(row["root"]) / row["path"], ranged, 16_000, level)
            assert abs(len(ours) - len(theirs)) <= 1
            n = min(len(ours), len(theirs))
            np.testing.assert_allclose(theirs[:n], ours[:n], atol=2e-3)


def test_a_channel_of_a_conversation(embed, tmp_path):
    left = np.sin(np.arange(16_000) / 7).astype(np.float32) / 4
    soundfile.write(tmp_path / "two.wav", np.stack([left, left[::-1] * 0.1], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(embed.waveform(tmp_path / "two.wav", {"channel": "0"}, 16_000, "recorded"), left)
    assert len(embed.waveform(tmp_path / "two.wav", {"channel": "1"}, 8_000, "recorded")) == 8_000


def test_clips_that_cannot_be_used_are_named_and_left_out(embed, bands, own_corpus, tmp_path, capsys):
    rows = own_corpus.head(4)
    root = Path(rows["root"].iloc[0])
    (root / rows["path"].iloc[0]).write_bytes(b"no audio")
    (root / rows["path"].iloc[1]).unlink()
    soundfile.write(root / "silent.wav", np.zeros(8000), 8000)
    rows = rows.assign(path=[*rows["path"][:2], "silent.wav", rows["path"].iloc[3]])[
        ["utterance_id", "path", "caption"]
    ]
    rows.to_csv(root / "some.csv", index=False)
    given = [str(bands), "--manifest", str(root / "some.csv"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="nothing to embed: 4 clips, 0 captions"):
        embed.main(given)
    given += ["--captions", str(tmp_path / "captions.csv")]
    embed.main(given)
    assert EmbeddingsFile.read(tmp_path / "out").utterance_ids == [rows["utterance_id"].iloc[3]]
    said = capsys.readouterr().err
    assert said.count("left out: ") == 3 and "silent" in said and "1 of 4 clips" in said
    with pytest.raises(SystemExit, match="none of 3 clips could be used"):
        rows.head(3).to_csv(root / "some.csv", index=False)
        embed.main(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nobody"], "no system 'nobody'; there are audioclip, clap-microsoft, mga-clap, paraspeechclap"),
        (["mga-clap"], "mga-clap needs --checkpoint: MGA-CLAP"),
    ],
)
def test_wrong_arguments_say_what_to_do(embed, given, message):
    with pytest.raises(SystemExit, match=message):
        embed.main([*given, "--manifest", "x.csv"])


def test_a_table_without_its_column_is_named(embed, bands, tmp_path):
    pd.DataFrame({"text": ["A"], "path": ["a.wav"]}).to_csv(tmp_path / "wrong.csv", index=False)
    with pytest.raises(SystemExit, match="wrong.csv has no column utterance_id; it has text, path"):
        embed.main([str(bands), "--manifest", str(tmp_path / "wrong.csv")])


def test_help_needs_none_of_the_systems():
    done = subprocess.run([sys.executable, EMBED, "mga-clap", "--help"], capture_output=True, text=True, check=True)
    assert "--repository" in done.stdout and "embeddings file" in done.stdout


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_published_systems_encoders_load_and_say_what_they_are(embed, system):
    """Without their packages: what can be read of them here. They have not been run with real weights, and say so."""
    module, name = embed.encoder(system)
    assert name == system and callable(module.load) and module.LICENCE and module.RATE >= 16_000 and module.WINDOW_S > 1
    assert "has not been run with the real weights" in " ".join(module.__doc__.split())
    pinned = (EMBED.parent / system / "requirements.txt").read_text()
    for package in ("numpy", "pandas", "scipy", "soundfile", "safetensors", "torch"):
        assert f"\n{package}" in pinned
    for source in (EMBED, EMBED.parent / system / "encoder.py"):  # older environments than ours read them
        ast.parse(source.read_text(), feature_version=(3, 8))
