"""Embeddings: kept frames answer alike without the backbone, and no damaged file is ever believed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from esr_utils import batches, frame_cache
from esr_utils.embedding import FrozenClips, embed, frozen_features
from esr_utils.frame_cache import FrameCache
from esr_utils.manifests import to_cuts
from esr_utils.retriever import StyleRetriever
from esr_utils.speech import active_frames

LEVEL = "normalised"


@pytest.fixture
def cuts(own_corpus) -> CutSet:
    """Six clips of 1 to 4 s in the order of the manifest, which is not that of their lengths."""
    chosen = own_corpus[own_corpus["split"] == "test"].head(6)
    assert not chosen["duration_s"].is_monotonic_increasing
    return to_cuts(chosen)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def clips_run(tiny_model, monkeypatch) -> list[int]:
    """Notes how many clips each pass through the backbone takes."""
    seen, layers = [], tiny_model.speech.layers

    def noted(waveform, n_samples, last_only):
        seen.append(len(n_samples))
        return layers(waveform, n_samples, last_only)

    monkeypatch.setattr(tiny_model.speech, "layers", noted)
    return seen


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def file_of(cut) -> Path:
    return Path(cut.recording.sources[0].source)


# Kept frames ------------------------------------------------------------------------------------------------


def test_the_second_time_the_backbone_is_not_run(tiny_model, cuts, cache, clips_run):
    first = frozen_features(tiny_model, cuts, LEVEL, cache)
    assert sum(clips_run) == 6 and len(files(cache)) == 6
    second = frozen_features(tiny_model, cuts, LEVEL, cache)
    assert sum(clips_run) == 6
    assert first.cut_ids == second.cut_ids == [cut.id for cut in cuts]
    assert torch.equal(first.pooled, second.pooled)
    assert first.pooled.shape == (6, 3, 32) and first.skipped.empty


def test_kept_frames_are_those_of_the_clip(tiny_model, cuts, cache):
    frozen_features(tiny_model, cuts, LEVEL, cache)
    for cut in cuts:
        waveform = batches.load_waveform(cut, LEVEL)
        with torch.no_grad():
            frames, _ = tiny_model.speech.layers(waveform[None], torch.tensor([len(waveform)]))
        kept, active = FrameCache(tiny_model.speech, LEVEL, cache).read(cut)
        assert kept.dtype == torch.float16 and kept.shape == frames[0].shape
        expected = active_frames(waveform[None], torch.tensor([len(waveform)]), 320, kept.shape[1])
        assert torch.equal(active, expected[0])
        assert float(F.cosine_similarity(kept.float(), frames[0], dim=-1).min()) >= 0.9999


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def one_byte_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


def reshaped(*shape: int, dtype=torch.float16, name="frames", active: int | None = None, pooled=1):
    def change(file: Path) -> None:
        flags = torch.ones(shape[1] if active is None else active, dtype=torch.bool)
        means, stats = torch.ones(shape[0], shape[-1]), torch.ones(shape[0], 2 * shape[-1] * pooled)
        save_file({name: torch.ones(shape, dtype=dtype), "active": flags, "mean": means, "stats": stats}, file)

    return change


DAMAGES = {
    "cut short": cut_short,
    "one byte short": one_byte_short,
    "empty": emptied,
    "overwritten": overwritten,
    "too few layers": reshaped(2, 50, 16),
    "too wide": reshaped(3, 50, 17),
    "flat": reshaped(3, 16),
    "float32": reshaped(3, 50, 16, dtype=torch.float32),
    "another tensor": reshaped(3, 50, 16, name="other"),
    "flags of another length": reshaped(3, 50, 16, active=49),
    "pooled too wide": reshaped(3, 50, 16, pooled=2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(tiny_model, cuts, cache, clips_run, damage):
    first = frozen_features(tiny_model, cuts, LEVEL, cache)
    victim = FrameCache(tiny_model.speech, LEVEL, cache).path(list(cuts)[2])
    whole = load_file(victim)["frames"].clone()  # not a view of the file
    DAMAGES[damage](victim)
    clips_run.clear()
    second = frozen_features(tiny_model, cuts, LEVEL, cache)
    assert clips_run == [1]
    torch.testing.assert_close(second.pooled, first.pooled, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(load_file(victim)["frames"], whole, atol=5e-3, rtol=1e-2)
    frozen_features(tiny_model, cuts, LEVEL, cache)
    assert clips_run == [1]


@pytest.mark.parametrize("frames", [0, 7])
def test_a_file_with_too_few_frames_is_made_anew(tiny_model, cuts, cache, clips_run, frames):
    frozen_features(tiny_model, cuts, LEVEL, cache)
    reshaped(3, frames, 16)(FrameCache(tiny_model.speech, LEVEL, cache).path(list(cuts)[2]))
    clips_run.clear()
    frozen_features(tiny_model, cuts, LEVEL, cache)
    assert clips_run == [1]


def names(model: StyleRetriever, cuts: CutSet, cache: Path, level=LEVEL) -> list[Path]:
    kept = FrameCache(model.speech, level, cache)
    return [kept.path(cut) for cut in cuts]


def test_every_clip_has_a_name_of_its_own_that_stays(tiny_model, cuts, cache):
    first = names(tiny_model, cuts, cache)
    assert len(set(first)) == 6 and names(tiny_model, cuts, cache) == first


def test_a_changed_audio_file_is_another_entry(tiny_model, cuts, cache, clips_run):
    before = names(tiny_model, cuts, cache)
    first = frozen_features(tiny_model, cuts, LEVEL, cache)
    one, other = (list(cuts)[i] for i in (0, 1))
    file_of(one).write_bytes(file_of(other).read_bytes())
    after = names(tiny_model, cuts, cache)
    assert [a == b for a, b in zip(after, before, strict=True)] == [False] + [True] * 5
    clips_run.clear()
    rows = to_cuts_again(one, other)
    second = frozen_features(tiny_model, rows, LEVEL, cache)
    torch.testing.assert_close(second.pooled[0], first.pooled[1], atol=2e-3, rtol=1e-3)


def to_cuts_again(*cuts: MonoCut) -> CutSet:
    """The cuts with their headers read anew."""
    found = []
    for cut in cuts:
        info = soundfile.info(file_of(cut))
        recording = Recording(cut.recording.id, cut.recording.sources, info.samplerate, info.frames, info.duration, [0])
        found.append(MonoCut(cut.id, 0.0, info.duration, 0, recording=recording, custom=cut.custom))
    return CutSet.from_cuts(found)


def test_the_name_is_of_the_content_not_of_the_path(tiny_model, cuts, cache, tmp_path):
    cut = list(cuts)[0]
    moved = tmp_path / "elsewhere.opus"
    moved.write_bytes(file_of(cut).read_bytes())
    recording = Recording.from_dict(cut.recording.to_dict())
    recording.sources[0].source = str(moved)
    same = MonoCut("other/id", cut.start, cut.duration, 0, recording=recording, custom=cut.custom)
    assert names(tiny_model, [same], cache) == names(tiny_model, [cut], cache)


def test_another_range_or_channel_is_another_entry(tiny_model, cuts, cache):
    cut = list(cuts)[0]
    parts = [cut, cut.truncate(duration=0.5), cut.truncate(offset=0.25, duration=0.5)]
    other = cut.truncate(duration=0.5)
    other.channel = 1
    assert len(set(names(tiny_model, [*parts, other], cache))) == 4


def test_another_level_or_backbone_is_another_entry(tiny_model, tiny_config, cuts, cache):
    found = set(names(tiny_model, cuts, cache)) | set(names(tiny_model, cuts, cache, "recorded"))
    changed = StyleRetriever.build(tiny_config)
    with torch.no_grad():
        changed.speech.encoder.conv1.bias[0] += 1.0
    found |= set(names(changed, cuts, cache))
    found |= set(names(StyleRetriever.build(tiny_config.but(speech_backbone="logmel")), cuts, cache))
    assert len(found) == 24


def test_killed_while_writing_nothing_half_written_is_taken_for_whole(tiny_model, cuts, cache, clips_run, monkeypatch):
    whole = frozen_features(tiny_model, cuts, LEVEL, cache / "whole")
    save, written = frame_cache.save_file, []

    def killed(tensors, path):
        save(tensors, path)
        written.append(path)
        if len(written) == 4:  # three are kept; of the fourth half was written
            Path(path).write_bytes(Path(path).read_bytes()[:500])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frame_cache, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            frozen_features(tiny_model, cuts, LEVEL, cache / "killed")
    assert len(files(cache / "killed")) == 3  # no rest lies about
    assert all(load_file(file)["frames"].shape[0] == 3 for file in files(cache / "killed"))
    clips_run.clear()
    after = frozen_features(tiny_model, cuts, LEVEL, cache / "killed")
    assert sum(clips_run) == 3  # it goes on where it was
    torch.testing.assert_close(after.pooled, whole.pooled, atol=2e-3, rtol=1e-3)


def test_a_killed_writers_leftover_is_not_read(tiny_model, cuts, cache, clips_run):
    """A process that is killed outright leaves its temporary file."""
    victim = FrameCache(tiny_model.speech, LEVEL, cache).path(list(cuts)[0])
    victim.parent.mkdir(parents=True)
    (victim.parent / f".{victim.name}.abc123").write_bytes(b"half a file")
    frozen_features(tiny_model, cuts, LEVEL, cache)
    assert sum(clips_run) == 6


# Clips that cannot be used ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_clips_that_cannot_be_used_are_named_and_the_rest_goes_on(tiny_model, cuts, cache, keep):
    all_there = embed(tiny_model, cuts, LEVEL, None)
    gone, torn = (list(cuts)[i] for i in (1, 4))
    file_of(gone).unlink()
    file_of(torn).write_bytes(file_of(torn).read_bytes()[:700])
    found = embed(tiny_model, cuts, LEVEL, cache if keep else None)
    assert sorted(found.skipped["utterance_id"]) == sorted([gone.id, torn.id])
    assert found.skipped["reason"].str.contains("decoded").all()
    left = [i for i, cut in enumerate(cuts) if cut.id not in (gone.id, torn.id)]
    assert found.utterance_ids == [all_there.utterance_ids[i] for i in left]
    assert float((found.vectors * all_there.vectors[left]).sum(1).min()) >= 0.9999


def test_a_collection_without_a_usable_clip_gives_no_vector(tiny_model, cuts, cache):
    for cut in cuts:
        file_of(cut).unlink()
    for folder in (cache, None):
        found = embed(tiny_model, cuts, LEVEL, folder)
        assert found.vectors.shape == (0, 8) and found.utterance_ids == [] and len(found.skipped) == 6


# Embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "stats"])
def test_an_embedding_is_that_of_the_waveform(tiny_config, cuts, cache, pooling):
    torch.manual_seed(0)
    model = StyleRetriever.build(tiny_config.but(pooling=pooling))
    kept, again, direct = (embed(model, cuts, LEVEL, folder) for folder in (cache, cache, None))
    assert kept.utterance_ids == direct.utterance_ids == [cut.id for cut in cuts]
    assert kept.vectors.dtype == np.float32 and np.array_equal(kept.vectors, again.vectors)
    np.testing.assert_allclose(np.linalg.norm(kept.vectors, axis=1), 1, atol=1e-5)
    model.eval()
    for cut, vector, other in zip(cuts, kept.vectors, direct.vectors, strict=True):
        waveform = batches.load_waveform(cut, LEVEL)
        with torch.no_grad():
            batch = {"waveform": waveform[None], "n_samples": torch.tensor([len(waveform)])}
            alone = model.encode_speech(batch)[0].numpy()
        assert float(alone @ vector) == pytest.approx(1, abs=1e-4)
        assert float(alone @ other) == pytest.approx(1, abs=1e-4)
    centred = kept.vectors - kept.vectors.mean(0)
    assert float(np.linalg.norm(centred, axis=1).max()) > 1e-3  # they are not all the same


def test_level_matters_to_an_embedding(tiny_model, cuts, cache):
    normalised, recorded = (embed(tiny_model, cuts, level, cache).vectors for level in (LEVEL, "recorded"))
    assert np.abs(normalised - recorded).max() > 1e-4


def test_a_tuned_backbones_frames_are_not_kept(tiny_model, cuts, cache):
    tiny_model.speech.requires_grad_(True)
    found = embed(tiny_model, cuts, LEVEL, cache)
    assert len(found.vectors) == 6 and files(cache) == []


@pytest.fixture
def long_clip(tmp_path, cuts):
    """Writes speech, repeated to so many seconds, and gives the cut."""

    def write(seconds: float, silent_from: float | None = None):
        speech = np.concatenate([batches.load_waveform(cut).numpy() for cut in cuts])
        samples = np.resize(speech, round(seconds * 16_000))
        if silent_from is not None:
            samples[round(silent_from * 16_000) :] = 0
        soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
        cut = Recording.from_file(tmp_path / "long.wav").to_cut()
        cut.custom = {"utterance_id": "mine/long", "style": ""}
        return CutSet.from_cuts([cut]), torch.from_numpy(samples)

    return write


def vectors_of(model: StyleRetriever, waveform: torch.Tensor, n: int) -> torch.Tensor:
    """(n, d) of n equal parts of a waveform, levelled each."""
    parts = torch.stack(torch.tensor_split(waveform, n))
    parts = parts * (10 ** (-26 / 20) / parts.square().mean(1, keepdim=True).sqrt())
    with torch.no_grad():
        return model.encode_speech({"waveform": parts, "n_samples": torch.full((n,), parts.shape[1])})


@pytest.mark.parametrize("keep", [True, False])
def test_a_long_clip_is_the_normalised_mean_of_its_windows(tiny_model, long_clip, cache, clips_run, keep):
    cuts, waveform = long_clip(36.0)
    found = embed(tiny_model, cuts, LEVEL, cache if keep else None)
    assert sum(clips_run) == 5  # ceil(36 / 8) windows of 7.2 s
    windows = vectors_of(tiny_model, waveform, 5)
    expected = F.normalize(windows.mean(0), dim=0).numpy()
    assert found.utterance_ids == ["mine/long"] and found.vectors.shape == (1, 8)
    assert float(found.vectors[0] @ expected) == pytest.approx(1, abs=1e-4)
    assert float((windows @ torch.from_numpy(expected)).min()) < 0.99999  # the windows do differ


def test_a_clip_of_30_s_is_embedded_whole(tiny_model, long_clip, clips_run):
    cuts, waveform = long_clip(30.0)
    found = embed(tiny_model, cuts, LEVEL, None)
    assert clips_run == [1]
    assert float(found.vectors[0] @ vectors_of(tiny_model, waveform, 1)[0].numpy()) >= 0.9999


def test_a_long_clip_with_a_silent_window_is_the_mean_of_the_others(tiny_model, long_clip, cache):
    cuts, waveform = long_clip(40.0, silent_from=24.0)
    found = embed(tiny_model, cuts, LEVEL, cache)
    expected = F.normalize(vectors_of(tiny_model, waveform[: 24 * 16_000], 3).mean(0), dim=0).numpy()
    assert float(found.vectors[0] @ expected) == pytest.approx(1, abs=1e-4) and found.skipped.empty


def test_clips_at_other_speeds_are_other_voices_of_the_same_utterance(tiny_model, cuts, cache):
    """A clip at 0.9 of its speed has 1/0.9 of the samples, and is kept for itself."""
    cuts = CutSet.from_cuts(list(cuts)[:2])
    found = list(batches.at_speeds(cuts, (0.9, 1.1)))
    assert len({cut.id for cut in found}) == 6
    for i, cut in enumerate(cuts):
        same, slow, fast = found[3 * i : 3 * i + 3]
        assert {batches.utterance_id(one) for one in (same, slow, fast)} == {cut.id}
        speaker = cut.custom["speaker"]
        assert [one.custom["speaker"] for one in (same, slow, fast)] == [speaker, f"{speaker}@0.9", f"{speaker}@1.1"]
        plain = batches.load_waveform(same, LEVEL)
        for one, speed in ((slow, 0.9), (fast, 1.1)):
            waveform = batches.load_waveform(one, LEVEL)
            assert abs(len(waveform) - len(plain) / speed) <= 2
            peaks = [float(torch.fft.rfft(x).abs()[: 6 * len(x) // 16].argmax()) / len(x) for x in (plain, waveform)]
            assert peaks[1] == pytest.approx(peaks[0] * speed, rel=0.02)  # the strongest frequency moves with it
    features = frozen_features(tiny_model, CutSet.from_cuts(found), LEVEL, cache)
    again = frozen_features(tiny_model, CutSet.from_cuts(found), LEVEL, cache)
    assert (
        torch.equal(features.pooled, again.pooled)
        and len(set(map(FrameCache(tiny_model.speech, LEVEL).path, found))) == 6
    )
    assert len({tuple(row.flatten().tolist()) for row in features.pooled}) == 6
    assert list(batches.at_speeds(cuts, ())) == list(cuts)


# What training reads ----------------------------------------------------------------------------------------


def test_an_epoch_of_frozen_clips_takes_one_window_of_each(tiny_model, cuts, cache):
    parts = batches.pieces(cuts, 1.0, 1.0)
    features = frozen_features(tiny_model, parts, LEVEL, cache)
    clips = FrozenClips(features, parts, batch_size=4)
    assert len(parts) > 12 and len(clips) == 6
    row_of = {cut_id: i for i, cut_id in enumerate(features.cut_ids)}
    drawn, orders = set(), set()
    for seed in range(8):
        found = list(clips.load(clips.plan(np.random.default_rng(seed))))
        assert [len(batch["utterance_id"]) for batch in found] == [4, 2]
        ids = sum((batch["utterance_id"] for batch in found), [])
        assert sorted(ids) == sorted(cut.id for cut in cuts)
        orders.add(tuple(ids))
        for row, utterance in zip(torch.cat([batch["pooled"] for batch in found]), ids, strict=True):
            own = [cut.id for cut in parts if batches.utterance_id(cut) == utterance]
            matches = [cut_id for cut_id in own if torch.equal(features.pooled[row_of[cut_id]], row)]
            assert len(matches) == 1
            drawn.add(matches[0])
        labels = sum((batch["style"].tolist() for batch in found), [])
        style_of = {cut.id: batches.style_label(cut) for cut in cuts}
        assert labels == [style_of[utterance] for utterance in ids]
    assert len(orders) > 4 and len(drawn) > 8
    again = [batch["utterance_id"] for batch in clips.load(clips.plan(np.random.default_rng(3)))]
    assert again == [batch["utterance_id"] for batch in clips.load(clips.plan(np.random.default_rng(3)))]


def test_features_made_in_two_goes_are_those_made_in_one(tiny_model, manifest, cache):
    """To the last bit: a run killed while frames are made would else not go on exactly."""
    cuts = to_cuts(manifest)
    whole = frozen_features(tiny_model, cuts, LEVEL, cache)
    for file in files(cache)[::3]:
        file.unlink()
    assert torch.equal(frozen_features(tiny_model, cuts, LEVEL, cache).pooled, whole.pooled)


def test_batches_of_one_corpus_each_and_of_a_corpus_as_often_as_it_has_voices():
    sizes, voices = {"small": 5, "middle": 30, "large": 65}, {"small": 1, "middle": 6, "large": 3}
    cuts = [
        SimpleNamespace(id=f"{name} {i}", custom={"corpus": name, "speaker": f"{name} {i % voices[name]}"})
        for name, n in sizes.items()
        for i in range(n)
    ]
    drawn, heard = Counter(), Counter()
    for seed in range(200):
        plan = batches.by_corpus(cuts, 10, np.random.default_rng(seed))
        assert len(plan) == len(batches.batched(cuts, 10))
        for batch in plan:
            (corpus,) = {cut.custom["corpus"] for cut in batch}
            assert len({cut.id for cut in batch}) == len(batch) == min(10, sizes[corpus])
            drawn[corpus] += 1
            heard.update(cut.id for cut in batch)
    for name, n in voices.items():
        share = n / sum(voices.values())
        assert abs(drawn[name] - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5  # five deviations
    assert len(heard) == 100
    assert plan == batches.by_corpus(cuts, 10, np.random.default_rng(199))
    assert batches.by_corpus([], 10, np.random.default_rng(0)) == []
