"""Mining whole: real stages on speech that is put together here, stopped, broken and resumed."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import soundfile
import tiny_mining
import torch
from safetensors.numpy import load_file

from esr_utils import manifests, runs, weights
from esr_utils.config import ConfigError, MiningConfig
from esr_utils.decoding import read_range
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.mining import MiningError, episode, mine, pipeline, segments, speakers, voices
from esr_utils.mining.funasr_models import funasr_model
from esr_utils.prompts import PromptBank

SHARED = Path(os.environ.get("ESR_DATA") or runs.PROJECT.parent / "shared" / "data")


def some_clips(manifest: pd.DataFrame, seed: int, n: int = 3) -> pd.DataFrame:
    """Clips of two voices of "mini" in turn."""
    pair = manifest[manifest["speaker"].isin(["f_alpha", "m_kumo"])]
    return pair.groupby("speaker").sample(n, random_state=seed).sample(frac=1, random_state=seed)


@pytest.fixture(scope="module")
def media(manifest, tmp_path_factory) -> Path:
    """Three episodes of twenty seconds. Do not change them."""
    root = tmp_path_factory.mktemp("media")
    for seed in range(3):
        episode.build_episode(some_clips(manifest, seed), root / f"episode {seed}.wav", seed=seed)
    return root


@pytest.fixture(scope="module")
def short(manifest, tmp_path_factory) -> Path:
    """One clip of each of two voices."""
    path = tmp_path_factory.mktemp("short") / "short.wav"
    episode.build_episode(some_clips(manifest, 0, n=1), path)
    return path


@pytest.fixture(scope="module")
def mined(media, tmp_path_factory) -> pipeline.Mined:
    return mine(media, tmp_path_factory.mktemp("runs") / "mined", language="en", licence="Apache-2.0")


@pytest.fixture
def again(media, mined, tmp_path) -> tuple[Path, Path]:
    """Copies, of the test's own, of the media and the run."""
    shutil.copytree(media, tmp_path / "media")
    shutil.copytree(mined.folder, tmp_path / "mined")
    return tmp_path / "media", tmp_path / "mined"


def worked_on(found: pipeline.Mined) -> dict[str, int]:
    return dict(zip(found.stages["stage"], found.stages["files"], strict=True))


def same(one: pipeline.Mined, other: pipeline.Mined) -> None:
    for table in ("clips", "manifest", "files"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table))


# What comes out ---------------------------------------------------------------------------------------------


def test_episodes_become_a_corpus_that_can_be_loaded(mined, media):
    loaded = load_corpora("mined", mined.folder.parent)
    assert len(loaded) == len(mined.manifest) == (mined.clips["left_out"] == "").sum() >= 12
    assert set(loaded["source"]) == {path.name for path in media.iterdir()}
    assert set(loaded["language"]) == {"en"} and set(loaded["licence"]) == {"Apache-2.0"}
    assert loaded["duration_s"].between(1.0, 15.0).all()
    for cut in to_cuts(loaded):
        assert cut.recording.sampling_rate == 24_000 and np.abs(cut.load_audio()).max() > 0.01
    written = pd.read_csv(mined.folder / "clips.csv", keep_default_na=False)
    assert written["id"].tolist() == mined.clips["id"].tolist()
    assert runs.read_json(mined.folder / "config.json")["mining"] == MiningConfig().to_dict()


def test_similarities_are_those_of_eq_5(again):
    """From the vectors as they lie in the run; nothing is merged or too short, so each segment is a clip."""
    found = mine(*again, MiningConfig(merge_gap_s=0, min_clip_s=0.01))
    for source in found.files["id"]:
        vectors = load_file(found.folder / "vectors" / f"{source}.safetensors")["vectors"]
        clips = found.clips[found.clips["id"].str.startswith(source)]
        assert len(vectors) == len(clips) >= 4
        expected = speakers.mean_similarity(vectors, clips["speaker"])
        np.testing.assert_allclose(clips["similarity"], expected, atol=1e-6)


def test_nothing_is_said(short, tmp_path, capfd):
    mine(short, tmp_path / "run")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("keep", "kept"), [(True, 1), (False, 0)])
def test_one_speaker_with_one_clip(manifest, tmp_path, keep, kept):
    episode.build_episode(manifest.head(1), tmp_path / "one.wav")
    found = mine(tmp_path / "one.wav", tmp_path / "run", MiningConfig(keep_single=keep, merge_gap_s=5))
    assert len(found.clips) == 1 and np.isnan(found.clips["similarity"][0]) and len(found.manifest) == kept
    assert found.clips["left_out"].tolist() == ["" if keep else "its speaker's only clip"]
    assert len(manifests.read_manifest(found.folder / "manifest.csv")) == kept


def test_silence_and_noise_hold_no_clips_and_are_no_failures(tmp_path):
    noise = episode.music(10 * 16_000, -30, np.random.default_rng(0))
    for name, sound in (("silence", np.zeros(16_000)), ("music", noise)):
        soundfile.write(tmp_path / f"{name}.wav", sound, 16_000)
    found = mine(tmp_path, tmp_path / "run")
    assert found.files["clips"].tolist() == [0, 0] and len(found.manifest) == len(found.failures) == 0
    assert len(manifests.read_manifest(found.folder / "manifest.csv")) == 0


def test_what_is_shorter_than_wanted_is_left_out_with_the_reason(again):
    media, run = again
    found = mine(media, run, MiningConfig(min_clip_s=2.0))
    short = found.clips["end_s"] - found.clips["start_s"] < 2.0
    assert short.any() and (found.clips["left_out"][short] == "too short").all()
    assert (found.clips["left_out"][~short] != "too short").all() and (found.manifest["duration_s"] >= 2.0).all()


# Resuming ---------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(again, mined, monkeypatch):
    media, run = again
    monkeypatch.setattr(segments, "silero_segments", None)
    monkeypatch.setattr(voices, "resemblyzer", None)  # no model is even opened
    found = mine(media, run, language="en", licence="Apache-2.0")
    assert set(worked_on(found).values()) == {0} and set(found.stages["done before"]) == {3}
    same(found, mined)


def test_other_settings_redo_only_what_hangs_on_them(again):
    media, run = again
    found = mine(media, run, MiningConfig(threshold=0.9))
    assert worked_on(found) == {"sound": 0, "vocals": 0, "segments": 0, "vectors": 0, "speakers": 3}
    judged = found.clips["similarity"].dropna()
    left_out = found.clips.loc[judged.index, "left_out"] == "unlike the rest of its speaker"
    assert (left_out == (judged < 0.9)).all() and left_out.any()


def test_a_file_that_changed_is_done_again(again, manifest):
    media, run = again
    episode.build_episode(some_clips(manifest, 7), media / "episode 1.wav", seed=7)
    found = mine(media, run)
    assert set(worked_on(found).values()) == {1}
    (media / "episode 2.wav").rename(media / "another name.wav")
    found = mine(media, run)
    assert set(worked_on(found).values()) == {1} and len(found.files) == 3


@pytest.mark.parametrize("damage", ["deleted", "changed", "cut"])
def test_a_stage_whose_files_were_touched_is_done_again(again, mined, damage):
    media, run = again
    path = next(p for p in (run / "segments").glob("episode-0-*.json") if ".done." not in p.name)
    if damage == "deleted":
        path.unlink()
    else:
        path.write_text("[]" if damage == "changed" else path.read_text()[:50])
    found = mine(media, run, language="en", licence="Apache-2.0")
    assert worked_on(found)["segments"] == 1
    same(found, mined)


def test_a_note_that_is_garbled_counts_as_none(again, mined):
    media, run = again
    next((run / "speakers").glob("*.done.json")).write_text('{"key": ')
    found = mine(media, run, language="en", licence="Apache-2.0")
    assert worked_on(found)["speakers"] == 1
    same(found, mined)


def test_a_run_that_was_killed_goes_on(media, mined, tmp_path):
    """SIGKILL in the middle of a stage; what the next run makes is as if nothing had happened."""
    program = f"from esr_utils.mining import mine; mine({str(media)!r}, {str(tmp_path / 'mined')!r})"
    child = subprocess.Popen([sys.executable, "-c", program], cwd=runs.PROJECT, stderr=subprocess.DEVNULL)
    waited = time.monotonic()
    while not list(tmp_path.glob("mined/segments/*.done.json")) and child.poll() is None:
        assert time.monotonic() - waited < 120
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "mined" / "manifest.csv").exists()
    done = len(list(tmp_path.glob("mined/segments/*.done.json")))
    found = mine(media, tmp_path / "mined", language="en", licence="Apache-2.0")
    assert worked_on(found) == {"sound": 0, "vocals": 0, "segments": 3 - done, "vectors": 3, "speakers": 3} and done
    same(found, mined)


def test_a_stage_that_stops_half_way_leaves_no_half_file(again, monkeypatch):
    """The disk is full, say, when half of a file is written."""
    media, run = again
    shutil.rmtree(run / "vocals")
    write, written = soundfile.SoundFile.write, []

    def full(self, data):
        if written:
            raise OSError("No space left on device")
        written.append(write(self, data))

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(MiningError, match="none of 3 files could be used.*No space left"):
        mine(media, run)
    monkeypatch.undo()
    assert written and not list((run / "vocals").iterdir())
    found = worked_on(mine(media, run))
    assert found["sound"] == 0 and found["vocals"] == 3


# Bad files --------------------------------------------------------------------------------------------------


def test_bad_files_are_reported_and_the_others_go_on(media, mined, tmp_path):
    home = tmp_path / "media"
    shutil.copytree(media, home)
    whole = (home / "episode 0.wav").read_bytes()
    (home / "broken.wav").write_bytes(b"RIFF" + bytes(500))
    (home / "empty.mp3").touch()
    (home / "text.flac").write_text("no audio at all")
    (home / "odd \n name; $(x) '\".wav").write_bytes(whole)
    found = mine(home, tmp_path / "run")
    assert sorted(found.failures["file"]) == ["broken.wav", "empty.mp3", "text.flac"]
    assert set(found.failures["stage"]) == {"sound"} and (found.failures["reason"] != "").all()
    assert len(found.files) == 4 and len(pd.read_csv(found.folder / "failures.csv")) == 3
    odd = found.manifest[found.manifest["source"].str.startswith("odd")]
    first = found.manifest[found.manifest["source"] == "episode 0.wav"]
    assert odd["duration_s"].tolist() == first["duration_s"].tolist() and len(odd)
    inside = {path.resolve().relative_to(found.folder.resolve()).parts[0] for path in found.folder.rglob("*")}
    assert inside == {
        "sound", "vocals", "segments", "vectors", "speakers", "config.json", "manifest.csv", "clips.csv", "stages.csv",
        "failures.csv", "files.csv",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"media", "run"}
    assert all(path.name.isascii() and path.name.isprintable() for path in found.folder.rglob("*"))


def test_a_failure_in_a_later_stage_is_that_files_alone(again):
    """A file whose voices are silent where somebody speaks."""
    media, run = again
    shutil.rmtree(run / "vectors")
    bad = next(p for p in (run / "vocals").glob("episode-2-*.16k.flac"))
    sound, rate = soundfile.read(bad)
    soundfile.write(bad, np.zeros_like(sound), rate)
    note = run / "vocals" / f"{bad.name.removesuffix('.16k.flac')}.done.json"
    noted = runs.read_json(note)
    noted["files"][bad.name] = [bad.stat().st_size, bad.stat().st_mtime_ns]  # as if the separator had left nothing
    runs.write_json(note, noted)
    found = mine(media, run)
    assert found.failures.to_dict("records") == [
        {"file": "episode 2.wav", "stage": "vectors", "reason": "is silent: there is no voice in it"}
    ]
    assert found.files["file"].tolist() == ["episode 0.wav", "episode 1.wav"]


def test_when_no_file_can_be_used_the_reasons_are_given(tmp_path):
    (tmp_path / "a.wav").write_text("nothing")
    with pytest.raises(MiningError, match=r"none of 1 files could be used.*a\.wav"):
        mine(tmp_path, tmp_path / "run")


def test_the_run_itself_is_not_mined(manifest, tmp_path):
    episode.build_episode(manifest.head(2), tmp_path / "a.wav")
    assert len(mine(tmp_path, tmp_path / "run").files) == len(mine(tmp_path, tmp_path / "run").files) == 1


@pytest.mark.parametrize("setting", [{"threshold": 2.0}, {"diariser": "pyannote"}, {"chunk_s": 1.0}, {"max_clip_s": 0}])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(ConfigError):
        MiningConfig().but(**setting)


# The packaged models ----------------------------------------------------------------------------------------


def test_silero_in_blocks_is_silero_at_once(media):
    """The package's own function on the whole of the audio."""
    import silero_vad

    path = media / "episode 0.wav"
    found = segments.silero_segments(path, max_s=15)
    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    options = {"max_speech_duration_s": 15, "min_silence_duration_ms": 200, "speech_pad_ms": 50}
    expected = silero_vad.get_speech_timestamps(wave, silero_vad.load_silero_vad(), **options)
    assert [(part.start_s, part.end_s) for part in found] == [
        (p["start"] / 16_000, p["end"] / 16_000) for p in expected
    ]
    assert len(found) >= 5


@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.59, 1.61, 2.4, 7.3])
def test_the_speaker_vector_is_resemblyzers_own(manifest, seconds, monkeypatch):
    """Of its package, whose webrtcvad is imported there and not used for this."""
    monkeypatch.setitem(sys.modules, "webrtcvad", ModuleType("webrtcvad"))
    from resemblyzer import VoiceEncoder, normalize_volume

    wave = np.concatenate([cut.resample(16_000).load_audio()[0] for cut in to_cuts(manifest.head(4))])
    wave = wave[: round(seconds * 16_000)] * 0.1
    with voices.resemblyzer(torch.device("cpu")) as encode:
        found = encode(wave)
    own = VoiceEncoder("cpu", verbose=False).embed_utterance(normalize_volume(wave, -30, increase_only=True))
    np.testing.assert_allclose(found, own, atol=1e-5)


def test_missing_packages_say_what_to_install(monkeypatch, media, tmp_path):
    monkeypatch.setattr(voices, "find_spec", lambda name: None)
    with pytest.raises(weights.WeightsError, match="pip install --no-deps resemblyzer==0.1.4"):
        mine(media, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Whole episodes of real speech ------------------------------------------------------------------------------


@cache
def ravdess() -> pd.DataFrame:
    """RAVDESS in four of its styles; the others change voices most."""
    if not (SHARED / "ravdess" / "manifest.csv").is_file():
        pytest.skip(f"needs the corpus {SHARED / 'ravdess'}; set $ESR_DATA to the folder that holds it")
    rows = load_corpora("ravdess", SHARED)
    return rows[rows["style"].isin(["neutral", "calm", "happy", "sad"])]


def four_actors(seed: int) -> pd.DataFrame:
    """Seven clips each of four RAVDESS actors, in any order."""
    rows = ravdess()
    actors = np.random.default_rng(seed).choice(sorted(rows["speaker"].unique()), 4, replace=False)
    part = rows[rows["speaker"].isin(actors)].groupby("speaker").sample(7, random_state=seed)
    return part.sample(frac=1, random_state=seed).reset_index(drop=True)


def test_an_episode_of_ravdess_is_cut_where_actors_speak_and_told_apart(tmp_path):
    """Two minutes, four actors, music-like noise at -25 dB: silero-vad and resemblyzer."""
    truth = episode.build_episode(four_actors(0), tmp_path / "episode.wav", noise_db=-25)
    found = mine(tmp_path / "episode.wav", tmp_path / "run")
    clips = found.clips[found.clips["left_out"] == ""]
    # every clip lies within one of the actors', and nearly all of theirs are found
    middles = (clips["start_s"] + clips["end_s"]) / 2
    owners = [truth.index[(truth["start_s"] <= m) & (m <= truth["end_s"])].tolist() for m in middles]
    assert all(len(owner) == 1 for owner in owners)
    homes = truth.loc[[owner[0] for owner in owners]]
    assert (clips["start_s"].to_numpy() >= homes["start_s"].to_numpy() - 0.1).all()
    assert (clips["end_s"].to_numpy() <= homes["end_s"].to_numpy() + 0.1).all()
    assert homes.index.nunique() >= 26  # of 28
    scores = episode.score(found.clips, truth).loc["clips that are kept"]
    assert scores["purity"] >= 0.95 and scores["found"] >= 26 / 28
    assert scores["speakers named"] <= 10  # emotion makes one voice two, but a clip is no speaker of its own


# With models in folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> MiningConfig:
    """The paper's pipeline, every model random and tiny."""
    root = tmp_path_factory.mktemp("models")
    folders = {kind: tiny_mining.write_funasr(root / kind, kind) for kind in tiny_mining.CONFIGS}
    return MiningConfig.paper().but(
        separator=tiny_mining.write_separator(root / "demucs"),
        chunk_s=5.0,
        vad=folders["FsmnVADStreaming"],
        asr=folders["BiCifParaformer"],
        punctuation=folders["CTTransformer"],
        speaker_encoder=folders["CAMPPlus"],
        emotion=folders["SenseVoiceSmall"],
        min_clip_s=0.05,  # its sentences are of a word or two
    )


def roots() -> set[str]:
    kinds = {"HDemucs", "CAMPPlus", "FsmnVADStreaming", "BiCifParaformer", "CTTransformer", "SenseVoiceSmall"}
    return {type(thing).__name__ for thing in gc.get_objects() if type(thing).__name__ in kinds}


def test_the_papers_pipeline_runs_and_holds_one_model_at_a_time(short, tiny, tmp_path, monkeypatch, capfd):
    held: dict[str, set[str]] = {}
    gc.collect()
    note = pipeline._note_done
    monkeypatch.setattr(
        pipeline, "_note_done", lambda stage, *rest: (held.update({stage.name: roots()}), note(stage, *rest))
    )
    found = mine(short, tmp_path / "run", tiny)
    assert capfd.readouterr() == ("", "")
    assert held == {
        "sound": set(),
        "vocals": {"HDemucs"},
        "speech": {"FsmnVADStreaming"},
        "words": {"BiCifParaformer"},
        "segments": {"CTTransformer"},
        "vectors": {"CAMPPlus"},
        "speakers": set(),
        "emotions": {"SenseVoiceSmall"},
    }
    assert not [name for name in sys.modules if name.split(".")[0] == "funasr"]
    rows = manifests.read_manifest(found.folder / "manifest.csv")
    assert len(rows) and set(rows["style"]) == {"happy"} and set(rows["style_raw"]) == {"HAPPY"}
    assert set(rows["caption"]) <= set(PromptBank.load().all_prompts("happy"))
    assert rows["text"].str.contains("[你好吗今天]|hello|yes").all()
    assert set(worked_on(mine(short, tmp_path / "run", tiny)).values()) == {0}


def test_other_weights_in_the_same_folder_are_noticed(short, tiny, tmp_path):
    folder = tmp_path / "cam"
    shutil.copytree(tiny.speaker_encoder, folder)
    config = tiny.but(separator="", emotion="", speaker_encoder=str(folder))
    first = mine(short, tmp_path / "run", config)
    file = folder / "campplus_cn_common.bin"
    torch.save({k: v * 1.5 if v.is_floating_point() else v for k, v in weights.read_state(file).items()}, file)
    found = worked_on(mine(short, tmp_path / "run", config))
    assert found == dict.fromkeys(worked_on(first), 0) | {"vectors": 1, "speakers": 1}


def test_a_loaded_model_is_what_was_written(tiny, short):
    """CAM++ on a window of 1.5 s: the mean over one window is its vector, as funasr computes it."""
    wave = read_range(short, 1.0, 2.5)
    with funasr_model(tiny.speaker_encoder, voices.CAMPLUS, torch.device("cpu")) as model:
        found = voices.CamPlus(model)(wave)
        state = weights.read_state(Path(tiny.speaker_encoder) / "campplus_cn_common.bin")
        assert all(torch.equal(state[name], tensor) for name, tensor in model.model.state_dict().items())
        own = model.model.inference([torch.from_numpy(wave)], device="cpu")[0][0]["spk_embedding"][0]
    np.testing.assert_allclose(found, (own / own.norm()).detach().numpy(), atol=1e-6)
    assert found.shape == (24,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vad": "fsmn-vad"}, r"config.yaml, model.pt, am.mvn from https://huggingface.co/funasr/fsmn-vad.*ESR_MODELS"),
        ({"asr": "paraformer"}, r"tokens.json, seg_dict from https://huggingface.co/funasr/paraformer-zh"),
        ({"speaker_encoder": "cam++"}, r"campplus_cn_common.bin from https://huggingface.co/funasr/campplus"),
        ({"emotion": "sensevoice"}, r"bpe.model from https://huggingface.co/FunAudioLLM/SenseVoiceSmall"),
        ({"separator": "hdemucs"}, r"hdemucs_high_trained.pt.*ESR_MODELS/torchaudio/hdemucs"),
    ],
)
def test_a_missing_model_is_asked_for_before_anything_is_done(short, tiny, tmp_path, change, said, monkeypatch):
    monkeypatch.delenv("ESR_MODELS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    with pytest.raises(weights.WeightsError, match=said):
        mine(short, tmp_path / "run", tiny.but(**change))
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_kind_or_damaged_is_refused(short, tiny, tmp_path):
    with pytest.raises(weights.WeightsError, match="holds a 'CAMPPlus'; needed is SenseVoiceSmall"):
        mine(short, tmp_path / "run", tiny.but(emotion=tiny.speaker_encoder, separator=""))
    shutil.copytree(tiny.vad, tmp_path / "vad")
    (tmp_path / "vad" / "model.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with (
        pytest.raises(weights.WeightsError, match="damaged, or holds more than tensors"),
        funasr_model(str(tmp_path / "vad"), segments.VAD, torch.device("cpu")),
    ):
        pass


@pytest.mark.parametrize("kind", segments.ASR)
def test_both_kinds_of_paraformer_say_words_within_the_speech(tmp_path, short, kind):
    folder = tiny_mining.write_funasr(tmp_path / kind, kind)
    speech = [segments.Segment(0.5, 2.0), segments.Segment(2.5, 4.0)]
    with funasr_model(folder, segments.ASR, torch.device("cpu")) as model:
        found = segments.transcribe(model, short, speech)
    assert len(found) > 4 and {word["word"] for word in found} <= {*tiny_mining.WORDS}
    starts = [word["start_s"] for word in found]
    assert starts == sorted(starts)
    assert all(any(p.start_s <= w["start_s"] <= w["end_s"] <= p.end_s for p in speech) for w in found)


def test_models_are_found_in_the_models_folder(tiny, tmp_path, monkeypatch, short):
    shutil.copytree(tiny.emotion, tmp_path / "models" / "FunAudioLLM" / "SenseVoiceSmall")
    monkeypatch.setenv("ESR_MODELS", str(tmp_path / "models"))
    found = mine(short, tmp_path / "run", MiningConfig(emotion="sensevoice"))
    assert set(found.manifest["style"]) == {"happy"}
