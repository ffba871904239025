"""Which files a folder holds, and names for them that are valid UTF-8 and can be turned back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esr_utils.audio_folder import NoAudio, absolute_key, absolute_path, file_key, find_audio, path_of, printable

ODD_NAMES = [
    b'it\'s "so".wav',
    b"two\nlines.mp3",
    b"caf\xe9.flac",
    "日本 é.ogg".encode(),
    b"100%.wav",
    b"%41.wav",
    b"a\\b.wav",
]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def names(folder: Path) -> list[str]:
    return [key for key, _ in find_audio(folder)[0]]


def reasons(folder: Path) -> dict[str, str]:
    return dict(find_audio(folder)[1])


def test_audio_by_its_ending_sorted(tmp_path):
    for name in (
        "b/two.WAV",
        "a.flac",
        "b/one.m4a",
        "film.mp4",
        "notes.txt",
        "wav",
        ".hidden.wav",
        ".git/x.wav",
        "b/c/d.mp3",
    ):
        touch(tmp_path / name)
    (tmp_path / "folder.wav").mkdir()
    assert names(tmp_path) == ["a.flac", "b/c/d.mp3", "b/one.m4a", "b/two.WAV", "film.mp4"]
    assert reasons(tmp_path) == {}
    assert all(path == tmp_path / key for key, path in find_audio(tmp_path)[0])


def test_one_file_of_any_name(tmp_path):
    path = touch(tmp_path / "recording")
    assert find_audio(path) == ([("recording", path)], [])
    assert file_key(path, path) == file_key(path, tmp_path) == "recording" and path_of("recording", path) == path


@pytest.mark.parametrize("where", ["nowhere", "empty", "texts"])
def test_nothing_found_is_said(tmp_path, where):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "texts" / "a.txt")
    with pytest.raises(NoAudio, match=r"is no file and no folder|holds no audio; known are \.wav"):
        find_audio(tmp_path / where)


# Links ------------------------------------------------------------------------------------------------------


def test_loops_of_links_end(tmp_path):
    touch(tmp_path / "sub" / "a.wav")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "one.wav").symlink_to("other.wav")
    (tmp_path / "other.wav").symlink_to("one.wav")
    assert names(tmp_path) == ["sub/a.wav"]
    assert reasons(tmp_path) == dict.fromkeys(["one.wav", "other.wav"], "is a link that leads nowhere")


def test_a_file_reached_twice_is_listed_once(tmp_path):
    touch(tmp_path / "real" / "a.wav")
    (tmp_path / "alias.wav").symlink_to("real/a.wav")
    (tmp_path / "again").symlink_to("real")
    assert names(tmp_path) == ["real/a.wav"] and reasons(tmp_path) == {}


def test_of_links_to_a_file_without_a_name_of_its_own_the_first_is_listed(tmp_path):
    """As git-annex and DVC keep files: the content in a hidden folder, links with names."""
    touch(tmp_path / ".store" / "0f3a")
    (tmp_path / "b.wav").symlink_to(".store/0f3a")
    (tmp_path / "a.wav").symlink_to(".store/0f3a")
    assert names(tmp_path) == ["a.wav"] and reasons(tmp_path) == {}


def test_a_link_to_a_hidden_folder_is_left_out_and_said(tmp_path):
    touch(tmp_path / "a.wav")
    touch(tmp_path / ".store" / "b.wav")
    (tmp_path / "data").symlink_to(".store")
    assert names(tmp_path) == ["a.wav"] and reasons(tmp_path) == {"data": "is a link to a hidden folder"}


def test_what_leads_outside_is_left_out_and_said(tmp_path):
    touch(tmp_path / "elsewhere" / "secret.wav")
    inside = tmp_path / "inside"
    touch(inside / "a.wav")
    (inside / "b.wav").symlink_to(tmp_path / "elsewhere" / "secret.wav")
    (inside / "more").symlink_to(tmp_path / "elsewhere")
    (inside / "notes.txt").symlink_to(tmp_path / "elsewhere" / "secret.wav")
    assert names(inside) == ["a.wav"]
    assert reasons(inside) == dict.fromkeys(["b.wav", "more"], "is a link that leads outside of the folder")


def test_a_folder_of_links_that_lead_outside_says_so(tmp_path):
    touch(tmp_path / "a.wav")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "b.wav").symlink_to("../a.wav")
    with pytest.raises(NoAudio, match="holds no audio.*b.wav: is a link that leads outside"):
        find_audio(tmp_path / "inside")


def test_the_folder_itself_may_be_a_link(tmp_path):
    touch(tmp_path / "real" / "a.wav")
    (tmp_path / "link").symlink_to("real")
    ((key, path),), _ = find_audio(tmp_path / "link")
    assert path == tmp_path / "real" / "a.wav" and key == file_key(path, tmp_path / "link") == "a.wav"


def test_pipes_and_closed_folders_are_left_out_and_said(tmp_path):
    touch(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "closed").mkdir(mode=0o000)
    found = reasons(tmp_path)
    assert names(tmp_path) == ["a.wav"] and found.pop("pipe.wav") == "is no file"
    assert found == (
        {} if os.access(tmp_path / "closed", os.R_OK) else {"closed": "cannot be opened: Permission denied"}
    )


# Keys -------------------------------------------------------------------------------------------------------


def test_names_of_any_bytes_are_found_and_come_back(tmp_path):
    for name in ODD_NAMES:
        try:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
        except OSError:
            pytest.skip("this file system takes no such names")
    files, _ = find_audio(tmp_path)
    assert sorted(path.name for _, path in files) == sorted(map(os.fsdecode, ODD_NAMES))
    for key, path in files:
        assert key.encode() and key == file_key(path, tmp_path)
        assert path_of(key, tmp_path) == path and path_of(key, tmp_path).is_file()


def test_plain_names_are_their_own_keys(tmp_path):
    assert file_key(tmp_path / "a b" / "é'\"\n.wav", tmp_path) == "a b/é'\"\n.wav"
    assert file_key(os.fsdecode(os.fsencode(tmp_path) + b"/100% caf\xe9.wav"), tmp_path) == "100%25 caf%E9.wav"


parts = st.binary(min_size=1, max_size=12).filter(lambda part: not {b"/", b"\0"} & {bytes([b]) for b in part})


@given(st.lists(parts.filter(lambda part: part not in (b".", b"..")), min_size=1, max_size=3))
def test_keys_are_utf8_and_reversible(inside):
    root = Path("/recordings")
    path = root / os.fsdecode(b"/".join(inside))
    key = file_key(path, root)
    assert path_of(key.encode().decode(), root) == path


@pytest.mark.parametrize(
    "key", ["/etc/passwd", "../a.wav", "a/../../b.wav", "a/../b.wav", "%2E%2E/a.wav", "%41.wav", "%e9.wav", "a%.wav",
            "", ".", "a//b.wav", "./a.wav", "a\0.wav", "a%00.wav", "a%2Fb.wav", "%C3%A9.wav", "\udce9.wav"],
)  # fmt: skip
def test_a_key_that_is_no_files_is_refused(tmp_path, key):
    """Those of files are written in one way only."""
    with pytest.raises(ValueError, match="is the name of no file below"):
        path_of(key, tmp_path)


def test_a_file_elsewhere_has_no_key(tmp_path):
    with pytest.raises(ValueError):
        file_key("/elsewhere/a.wav", tmp_path)


def test_printable():
    assert printable(os.fsdecode(b"a\nb\xe9\x1b[31m\xc3\xa9")) == "a\ufffdb\ufffd\ufffd[31mé"


def test_an_absolute_key_is_the_path_itself_where_that_can_be_written(tmp_path, monkeypatch):
    assert absolute_key(tmp_path / "日本 'é'" / "a.wav") == str(tmp_path / "日本 'é'" / "a.wav")
    monkeypatch.chdir(tmp_path)
    assert absolute_key("b/../a.wav") == str(tmp_path / "a.wav")
    assert absolute_key("/") == "/"
    for name in ODD_NAMES:
        path = tmp_path / os.fsdecode(name)
        key = absolute_key(path)
        assert absolute_path(key) == path and key.startswith("/") and key.encode()
    for key in ("/../a.wav", "/a/%zz.wav", "//a.wav", ""):
        with pytest.raises(ValueError, match="is the name of no file"):
            absolute_path(key)
