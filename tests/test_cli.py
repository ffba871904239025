"""The esr command, as somebody at a shell meets it: what it prints where, its exit codes, Ctrl-C, pipes, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from esr_utils import cli, listening, recordings
from esr_utils.audio_folder import printable
from esr_utils.cli_options import ERROR, INTERRUPTED, NOTHING, OK, PIPE_CLOSED, USAGE
from esr_utils.index import Index

RATE = 16_000
QUERY = "Someone whispering, half asleep"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech) -> Path:
    """Three recordings, one with an odd name, one of two channels, and one that is none. Do not change it."""
    root = tmp_path_factory.mktemp("recordings")
    soundfile.write(root / "one.flac", speech[: 10 * RATE], RATE)
    call = np.stack([speech[: 8 * RATE], speech[8 * RATE : 16 * RATE]], axis=1)
    soundfile.write(root / "call.wav", call, RATE)
    with open(os.fsencode(root) + b'/two\nlines "caf\xe9" 100%.wav', "wb") as file:
        soundfile.write(file, speech[16 * RATE : 22 * RATE], RATE, format="WAV")
    (root / "broken.mp3").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def filled(folder, tiny_run, tmp_path_factory) -> str:
    """An index of these, split by channel. Do not change it."""
    path = tmp_path_factory.mktemp("index") / "filled"
    assert cli.main(["index", str(folder), "--index", str(path), "--run", str(tiny_run), "--channels", "split"]) == OK
    return str(path)


@pytest.fixture
def own(filled, tmp_path) -> str:
    """A copy that belongs to a test."""
    return str(shutil.copytree(filled, tmp_path / "own"))


@pytest.fixture
def esr(capsys):
    """Runs a command: its exit code, what is on stdout, what is on stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # of argparse
            code = error.code
        return code, *capsys.readouterr()

    return run


def contents(path: str) -> list:
    index = Index.open(path)
    return index.table.to_pandas().drop(columns=["id", "version", "written"]).to_json(), len(index.files())


# index ------------------------------------------------------------------------------------------------------


def test_an_index_is_made_and_brought_up_to_date(esr, folder, tiny_run, tmp_path, speech):
    mine, path = shutil.copytree(folder, tmp_path / "mine"), tmp_path / "index"
    code, out, err = esr("index", mine, "--index", path, "--run", tiny_run)
    assert code == OK and re.match(
        r"3 files embedded \(\d+ moments, 0.01 h of speech\), 0 unchanged \(0 with other labels\), 0 removed", out
    )
    assert err == f"esr: {mine}/broken.mp3: is empty (0 bytes)\n"  # and no bar: nobody watches
    soundfile.write(mine / "new.wav", speech[: 4 * RATE], RATE)
    (mine / "one.flac").unlink()
    code, out, err = esr("index", mine, "--index", path, "--json")  # the run is known by now
    done = json.loads(out)
    assert (code, err) == (OK, "") and done["moments"] > 0
    assert [done[name] for name in ("embedded", "unchanged", "removed", "files_in_index")] == [1, 3, 1, 3]


def test_several_folders_and_a_file(esr, folder, tiny_run, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(folder / "one.flac", tmp_path / "a")
    arguments = (
        "index",
        tmp_path / "a",
        folder / "call.wav",
        "--index",
        tmp_path / "index",
        "--run",
        tiny_run,
        "--json",
    )
    code, out, _ = esr(*arguments)
    assert code == OK and json.loads(out)["embedded"] == 2


def test_a_folder_without_audio(esr, own, tmp_path):
    before = contents(own)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        code, out, err = esr("index", place, "--index", own)
        assert code == ERROR and out == "" and str(place) in err and "Traceback" not in err
    assert contents(own) == before
    assert esr("index", tmp_path / "empty", "--index", tmp_path / "new")[0] == ERROR
    assert not (tmp_path / "new").exists()


def test_recordings_that_are_gone_for_good_are_dropped_when_that_is_said(esr, own, folder, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "mine")
    assert esr("index", mine, "--index", own)[0] == OK
    before = contents(own)
    shutil.rmtree(mine)
    code, _, err = esr("index", mine, "--index", own)
    assert code == ERROR and "--gone drops them from the index" in err and contents(own) == before
    code, out, _ = esr("index", mine, "--index", own, "--gone", "--json")
    assert code == OK and json.loads(out)["removed"] == 4 and contents(own)[1] == before[1] - 4


def test_files_none_of_which_can_be_used_are_an_error_where_the_index_holds_nothing_else(esr, own, folder, tmp_path):
    new, run = tmp_path / "new", Index.open(own).about["run"]
    for problems in (1, 0):  # the second time it is known, and not tried again
        code, out, err = esr("index", folder / "broken.mp3", "--index", new, "--run", run)
        assert code == ERROR and f"there is nothing to search: esr stats --index {new} says why" in err
        assert out.startswith("0 files embedded (0 moments, ") and f" {problems} with problems; " in out
        assert out.endswith("holds 0 moments of 0 files\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "empty.wav").touch()
    before = contents(own)
    code, out, err = esr("index", tmp_path / "mine", "--index", own, "--json")  # there is more to search
    assert code == OK and json.loads(out)["embedded"] == 0 and "is empty (0 bytes)" in err
    shutil.rmtree(tmp_path / "mine")
    assert esr("index", tmp_path / "mine", folder, "--index", own, "--gone")[0] == OK and contents(own)[1] == before[1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((""), USAGE, "an empty path"),
        (("{folder}", "--index", ""), USAGE, "an empty path"),
        (("{folder}", "--index", "memory://"), USAGE, "memory:// would be gone when the command ends"),
        (("{folder}", "--index", "s3:/bucket/index"), ERROR, "write two slashes"),
        (("~nosuchuser/calls"), ERROR, "is no file and no folder"),
        (("{loop}"), ERROR, "loop"),
        (("{folder}", "--index", "{tmp}/two\nlines"), ERROR, "cannot be printed"),
        (("{folder}", "--index", "{tmp}/caf\udce9"), ERROR, "cannot be printed"),
    ],
)  # fmt: skip
def test_places_that_are_none(esr, folder, tiny_run, tmp_path, arguments, code, said):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [arguments] if isinstance(arguments, str) else list(arguments)
    places = [one.format(folder=folder, loop=tmp_path / "loop", tmp=tmp_path) for one in places]
    places += [] if "--index" in places else ["--index", str(tmp_path / "new")]
    found, out, err = esr("index", *places, "--run", tiny_run)
    assert found == code and out == "" and said in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("command", [["search", QUERY], ["stats"]])
def test_an_index_of_which_a_file_is_gone(esr, own, command):
    for file in Path(own).glob("moments.lance/data/*"):
        file.unlink()
    code, out, err = esr(*command, "--index", own)
    assert code == ERROR and out == "" and "one of its files is gone or damaged" in err and len(err.splitlines()) == 1


def test_a_shell_that_has_closed_the_output(filled, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["stats", "--index", filled]) == OK
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["search", QUERY, "--min-score", "1", "--index", filled]) == NOTHING


def test_channels_stay_as_the_index_was_made(esr, own, folder, tmp_path):
    """`own` was split: what is new is split too, without a word, and is not mixed."""
    soundfile.write(tmp_path / "new.wav", *soundfile.read(folder / "call.wav"))
    assert esr("index", tmp_path / "new.wav", "--index", own)[0] == OK
    rows = Index.open(own).table.to_pandas().query("written == 0")
    assert set(rows[rows["file"] == str(tmp_path / "new.wav")]["channel"]) == {0, 1}
    before = contents(own)
    code, _, err = esr("index", tmp_path / "new.wav", "--index", own, "--channels", "mix")
    assert code == ERROR and "was made with channels 'split', not 'mix'" in err and contents(own) == before
    assert esr("index", tmp_path / "new.wav", "--index", own, "--channels", "split")[0] == OK
    assert "channels:            split" in esr("stats", "--index", own)[1]


def test_what_an_index_adapts_by_must_be_known_and_possible(esr, own, folder, tiny_run, tmp_path):
    new = tmp_path / "new.index"
    code, _, err = esr("index", folder, "--index", new, "--run", tiny_run, "--adapt", "anna")
    assert code == USAGE and "--adapt anna: it is off, all, or a column, here file, channel, speaker" in err
    code, _, err = esr("index", folder, "--index", new, "--run", tiny_run, "--adapt", "all")
    assert code == USAGE and "takes its features as they are" in err and not new.exists()
    code, _, err = esr("index", folder, "--index", own, "--run", tiny_run, "--adapt", "off")
    assert code == OK


def test_another_model_s_index_is_refused_with_both_names(esr, own, folder, tiny_model, tmp_path):
    before = contents(own)
    tiny_model.text_head.weight.data += 1
    tiny_model.save(tmp_path / "other" / "best")
    (tmp_path / "other" / "config.json").write_text('{"training": {"level": "recorded"}}')
    for command in (["index", folder], ["search", QUERY]):
        code, _, err = esr(*command, "--index", own, "--run", tmp_path / "other")
        assert code == ERROR and len(re.findall(r"8-d [0-9a-f]{16}", err)) == 2
    assert contents(own) == before


def test_a_run_that_is_not_there_or_is_none(esr, folder, tiny_run, tmp_path):
    code, _, err = esr("index", folder, "--index", tmp_path / "index", "--run", tmp_path / "none")
    assert code == ERROR and "holds no retriever" in err and not (tmp_path / "index").exists()
    shutil.copytree(tiny_run, tmp_path / "odd")
    for settings in ("{}", "no json", '{"training": 1}'):
        (tmp_path / "odd" / "config.json").write_text(settings)
        code, _, err = esr("index", folder, "--index", tmp_path / "index", "--run", tmp_path / "odd")
        assert code == ERROR and "no run that can be used" in err
    assert esr("index", folder, "--index", tmp_path / "index", "--run", "..")[0] == ERROR


def test_a_run_that_has_moved_since(esr, folder, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert esr("index", folder, "--index", tmp_path / "index", "--run", run)[0] == OK
    run.rename(tmp_path / "moved")
    code, _, err = esr("search", QUERY, "--index", tmp_path / "index")
    assert code == ERROR and "--run says where it is now" in err
    assert esr("search", QUERY, "--index", tmp_path / "index", "--run", tmp_path / "moved")[0] == OK


def test_without_a_run_it_is_the_default_one(esr, folder, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("esr_utils.runs.RUNS", tiny_run.parent)
    monkeypatch.setattr(recordings, "DEFAULT_RUN", tiny_run.name)
    assert esr("index", folder, "--index", tmp_path / "index")[0] == OK
    assert Index.open(tmp_path / "index").about["run"] == ""  # wherever that is, here or on another machine
    assert esr("search", QUERY, "--index", tmp_path / "index")[0] == OK


def test_a_disk_that_is_full(esr, folder, tiny_run, tmp_path, speech):
    """A small one, where one may be mounted; its index is good, and goes on when there is room."""
    disk, fill = tmp_path / "disk", tmp_path / "disk" / "fill"
    disk.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "esr", disk], capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here")
    try:
        arguments = ("--index", disk / "index", "--run", tiny_run)
        assert esr("index", folder / "one.flac", *arguments)[0] == OK
        before = contents(disk / "index")
        with fill.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(512))
        code, _, err = esr("index", folder / "call.wav", *arguments)
        assert code == ERROR and "make room" in err and "Traceback" not in err
        assert contents(disk / "index") == before
        assert esr("search", QUERY, "--index", disk / "index")[0] == OK
        code, _, err = esr("export", QUERY, "--index", disk / "index", "--to", disk / "clips")
        assert code == ERROR and "No space left" in err
        fill.unlink()
        assert esr("index", folder / "call.wav", *arguments)[0] == OK
        assert contents(disk / "index")[1] == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_bar_for_who_watches(esr, folder, tiny_run, tmp_path, monkeypatch):
    arguments = ("index", folder, "--index", tmp_path / "index", "--run", tiny_run)
    monkeypatch.setattr(cli, "_watched", lambda: True)
    _, out, err = esr(*arguments)
    assert "4/4" in err and "x real time" in err and "real time" not in out


def test_labels_of_files_that_are_not_there_are_told(esr, folder, tiny_run, tmp_path):
    recordings_of = shutil.copytree(folder, tmp_path / "recordings")
    (recordings_of / "labels.csv").write_text(f"path,speaker\none.flac,anna\ntypo.flac,ben\n\0,carl\n{'n' * 300},d\n")
    arguments = ("--index", tmp_path / "index", "--run", tiny_run)
    code, _, err = esr("index", recordings_of, *arguments)
    assert code == OK and f"labels name 3 files that are not there, such as {recordings_of}/typo.flac" in err


def test_labels_that_cannot_be_used(esr, own, tmp_path, folder):
    shutil.copy(folder / "one.flac", tmp_path)
    (tmp_path / "labels.csv").write_text("speaker\nanna\n")
    before = contents(own)
    code, _, err = esr("index", tmp_path / "one.flac", "--index", own)
    assert code == ERROR and "has no column 'path'" in err and contents(own) == before


# search -----------------------------------------------------------------------------------------------------


def test_hits_for_people(esr, filled, folder):
    code, out, err = esr("search", QUERY, "--index", filled, "-k", 3)
    assert (code, err) == (OK, "") and len(out.splitlines()) == 3
    line = r" +\d  -?0\.\d{3}  +\d+\.\d % below  0:00:\d\d\.\d - 0:00:\d\d\.\d  (channel \d  )?/"
    assert all(re.match(line, hit) and str(folder) in hit for hit in out.splitlines())


def test_hits_for_programs(esr, filled, folder):
    code, out, _ = esr("search", QUERY, "--index", filled, "-k", 100, "--json")
    hits = json.loads(out)
    expected = Index.open(filled, recordings.load_retriever(Index.open(filled).about["run"])[0]).search(QUERY, k=100)
    assert code == OK and out.isascii() and [hit["id"] for hit in hits] == expected["id"].tolist()
    assert [hit["score"] for hit in hits] == pytest.approx(expected["score"].tolist(), abs=1e-6)
    assert {hit["channel"] for hit in hits} == {None, 0, 1} and hits[0]["rank"] == 1 and 0 <= hits[0]["percentile"] <= 1
    found = {os.fsencode(hit["path"]) for hit in hits}  # also of names that no text can hold
    assert found == {os.fsencode(path) for path in folder.iterdir() if path.suffix != ".mp3"}
    assert esr("search", QUERY, "--index", filled, "-k", 100)[1].count("\n") == len(hits)  # one line each, of any name


def ids(esr, *arguments) -> list[str]:
    code, out, err = esr("search", *arguments, "-k", 100, "--json")
    assert code == OK, err
    return [hit["id"] for hit in json.loads(out)]


def test_what_is_asked_for_is_what_the_index_is_asked(esr, filled, folder):
    index = Index.open(filled, recordings.load_retriever(Index.open(filled).about["run"])[0])
    calm, call = "Speech that is calm.", str(folder / "call.wav")

    def expected(query, **options):
        return index.search(query, **{"k": 100} | options)["id"].tolist()

    def found(*arguments):
        return ids(esr, *arguments, "--index", filled)

    middle = float(index.search(QUERY, k=100)["score"].median())
    assert found(QUERY, calm) == expected([QUERY, calm])
    assert found("a", "calm", "voice") == expected("a calm voice")  # quotes were forgotten
    assert found("a calm voice", "angry") == expected(["a calm voice", "angry"]) != expected("a calm voice angry")
    assert found(QUERY, "--minus", calm) == expected(QUERY, minus=calm)
    assert found(QUERY, "--min-score", str(middle)) == expected(QUERY, min_score=middle)
    assert found(QUERY, "--one-per", "file") == expected(QUERY, one_per="file")
    assert found(QUERY, "--offset", "2") == expected(QUERY, offset=2)
    assert found(QUERY, "--where", f"file={call}") == expected(QUERY, where={"file": call})
    where = ("--where", "channel=1", "--where", "start_s=0..5.5", "--where", "end_s=..8")
    assert found(QUERY, *where) == expected(QUERY, where={"channel": 1, "start_s": (0, 5.5), "end_s": (None, 8)})
    several = ("--where", "channel=0", "--where", "channel=1", "--where", "start_s=2..")
    assert found(QUERY, *several) == expected(QUERY, where={"channel": [0, 1], "start_s": (2, None)})
    first = expected(QUERY)[0]
    assert found("--like", first) == index.search_like(first, k=100)["id"].tolist()
    example = str(folder / "one.flac")
    assert found("--like", example) == index.search_like(example, k=100)["id"].tolist()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what is looked for"),
        ([""], "the query is empty"),
        ([" ", " "], "the query is empty"),
        (["word " * 10_000], r"10000 words\) long"),
        (["word"] * 10_000, r"10000 words\) long"),
        ([QUERY, "--minus", ""], "the query is empty"),
        ([QUERY, "--where", "mood=good"], "there is no column 'mood'; this index has id, file"),
        ([QUERY, "--where", "channel"], "write column=value"),
        ([QUERY, "--where", "channel=left"], "channel is a number"),
        ([QUERY, "--where", "start_s=.."], "a range is"),
        ([QUERY, "--where", "start_s=nan"], "nan is no value of it"),
        ([QUERY, "--one-per", "mood"], "there is no column 'mood'"),
        ([QUERY, "-k", "0"], "k is 0"),
        ([QUERY, "-k", "many"], "invalid int value"),
        ([QUERY, "--min-score", "nan"], "min_score is no number"),
        ([QUERY, "--offset", "-1"], "offset is -1"),
        ([QUERY, "--like", "a.wav"], "--like takes no sentence"),
        (["caf\udce9"], "bytes that are no UTF-8"),
        ([QUERY, "--minus", "caf\udce9"], "bytes that are no UTF-8"),
        ([QUERY, "--where", "speaker=\udcff"], "bytes that are no UTF-8"),
        (["--like", "/nowhere/\udcff.wav"], "neither the id of a moment of this index nor an audio file"),
        (["--like", "/nowhere/a.wav"], "neither the id of a moment of this index nor an audio file"),
    ],
)  # fmt: skip
def test_queries_without_an_answer(esr, filled, arguments, said):
    for command in (["search"], ["export", "--to", "/nowhere"]) if arguments else (["search"],):
        code, out, err = esr(*command, *arguments, "--index", filled)
        assert code == USAGE and out == "" and re.search(said, err) and len(err) < 2000, (code, err)


def test_of_several_conditions_on_one_column_any_holds(esr, filled):
    def found(*where):
        code, out, _ = esr("search", QUERY, "-k", 100, "--json", "--index", filled, *where)
        return {hit["id"]: hit["start_s"] for hit in json.loads(out)}

    everything = found()
    early, late = sorted(everything.values())[1], sorted(everything.values())[-2]
    several = ("--where", f"start_s=..{early}", "--where", f"start_s={late}..")
    assert early < late and found(*several) == {i: s for i, s in everything.items() if s <= early or s >= late}
    one = sorted(everything.values())[len(everything) // 2]
    assert set(found(*several, "--where", f"start_s={one}").values()) == {one, *found(*several).values()}


def test_a_file_is_named_as_it_is_printed_or_by_its_key(esr, folder, tiny_run, tmp_path, monkeypatch):
    mine, index = tmp_path / "mine", tmp_path / "index"
    mine.mkdir()
    names = [b"plain.flac", b"100%.flac", b'it\'s "mine".flac', b"two\nlines.flac", b"caf\xe9.flac"]
    for name in names:
        shutil.copy(folder / "one.flac", os.path.join(os.fsencode(mine), name))
    assert esr("index", mine, "--index", index, "--run", tiny_run)[0] == OK
    found = json.loads(esr("search", QUERY, "-k", 100, "--one-per", "file", "--json", "--index", index)[1])
    assert {os.path.basename(os.fsencode(hit["path"])) for hit in found} == set(names)
    monkeypatch.chdir(mine)
    for hit in found:
        printed = printable(hit["path"])
        for said in (printed, hit["path"], os.path.basename(hit["path"]), hit["file"]):
            code, out, _ = esr("search", QUERY, "-k", 100, "--where", f"file={said}", "--index", index)
            assert code == OK and all(line.endswith(f"  {printed}") for line in out.splitlines()), said
    assert esr("search", QUERY, "--where", "file=/nowhere/\udcff.wav", "--index", index)[0] == NOTHING
    (tmp_path / "link").symlink_to(mine)
    assert esr("search", QUERY, "--where", f"file={tmp_path}/link/plain.flac", "--index", index)[0] == OK


def test_stats_name_each_bad_file_also_those_that_print_alike(esr, folder, tmp_path, tiny_run):
    shutil.copy(folder / "one.flac", tmp_path)
    for name in (b"q\xfe.wav", b"q\xff.wav"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text("no sound")
    assert esr("index", tmp_path, "--index", tmp_path / "index", "--run", tiny_run)[0] == OK
    out = esr("stats", "--index", tmp_path / "index")[1]
    assert re.search(r"problems: +2\n", out) and out.count("q\ufffd.wav: ") == 2


def test_an_example_is_not_hours_long(esr, filled, folder, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(62), 1)
    code, _, err = esr("search", "--like", tmp_path / "long.wav", "--index", filled)
    assert code == USAGE and "is longer than 60 s" in err and len(err.splitlines()) == 1


def test_an_example_whose_name_is_no_utf8(esr, filled, folder):
    (odd,) = (path for path in folder.iterdir() if path.name.startswith("two"))
    assert esr("search", "--like", odd, "--index", filled)[0] == OK


def test_values_are_values_and_never_part_of_a_query(esr, own):
    before = contents(own)
    code, out, _ = esr("search", QUERY, "--where", "file=x' OR 'a'='a", "--index", own, "--json")
    assert code == NOTHING and json.loads(out) == [] and contents(own) == before


def test_nothing_found_has_a_code_of_its_own(esr, filled, tmp_path):
    assert esr("search", QUERY, "--min-score", "1", "--index", filled) == (NOTHING, "", "esr: nothing was found\n")
    assert esr("export", QUERY, "--min-score", "1", "--index", filled, "--to", tmp_path / "clips")[0] == NOTHING
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize("command", [["search", QUERY], ["stats"]])
def test_no_index(esr, tmp_path, command):
    code, out, err = esr(*command, "--index", tmp_path / "none")
    assert code == ERROR and out == "" and "holds no index" in err and not (tmp_path / "none").exists()
    assert esr("search", QUERY)[0] == esr("stats")[0] == esr()[0] == USAGE


# stats and export -------------------------------------------------------------------------------------------


def test_stats(esr, filled, folder, tiny_run):
    code, out, err = esr("stats", "--index", filled)
    assert (code, err) == (OK, "") and re.search(r"files: +4\n", out) and "broken.mp3: is empty (0 bytes)" in out
    about = json.loads(esr("stats", "--index", filled, "--json")[1])
    assert about["run"] == str(tiny_run) and about["level"] == "recorded" and about["files"] == 4
    assert about["problems"] == {str(folder / "broken.mp3"): "is empty (0 bytes)"}


def test_export_of_a_query_and_of_what_search_has_found(esr, filled, tmp_path, monkeypatch):
    query = (QUERY, "--index", filled, "-k", 100)
    code, out, err = esr("export", *query, "--to", tmp_path / "a")
    found = esr("search", *query, "--json")[1]
    n = len(json.loads(found))
    assert (code, out, err) == (OK, f"{n} of {n} hits cut to {tmp_path / 'a'}\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(found))
    assert esr("export", "--to", tmp_path / "b")[0] == OK
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(names) == n + 1
    for name in names[:-1]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    code, _, err = esr("export", *query, "--to", tmp_path / "a")
    assert code == ERROR and "is not empty" in err


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[" * 100_000, "{}", '["a"]', "[{}]", '[{"file": 1}]', '[{"file": "/a", "start_s": "1"}]',
     '[{"file": "/a", "start_s": 1e300}]', '[{"file": "/a", "channel": 0.5}]', '[{"file": "/a", "channel": true}]',
     '[{"file": "/a", "channel": 1000000000000}]', '[{"file": "/\\udc80"}]', '[{"file": "/a", "x": "\\ud800"}]',
     '[{"file": "/a", "start_s": NaN}]', '[{"file": "/a", "end_s": Infinity}]', '[{"file": "/a", "channel": -1}]'],
)  # fmt: skip
def test_what_is_not_of_search_is_refused(esr, tmp_path, monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, _, err = esr("export", "--to", tmp_path / "clips")
    assert code == USAGE and "is not what esr search --json prints" in err and not (tmp_path / "clips").exists()


def test_hits_that_are_gone_are_named(esr, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([{"file": "/nowhere/a.wav", "start_s": 1, "end_s": 2}])))
    code, out, err = esr("export", "--to", tmp_path / "clips")
    assert (code, err) == (ERROR, "esr: /nowhere/a.wav: is not there\n") and out.startswith("0 of 1 hits")


def test_export_to_nowhere(esr, filled):
    code, _, err = esr("export", QUERY, "--index", filled, "--to", "")
    assert code == USAGE and "an empty path" in err


def test_hits_from_stdin_are_not_chosen_among(esr, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("[]"))
    code, _, err = esr("export", "--to", tmp_path / "clips", "--where", "speaker=anna")
    assert code == USAGE and "give them to esr search" in err


# A shell ----------------------------------------------------------------------------------------------------


def test_help_has_examples_and_codes_and_comes_at_once(esr):
    code, out, _ = esr("search", "--help")
    assert code == OK and "examples:" in out and "130  interrupted" in out and 'esr search "excited" --minus' in out
    assert 'angry sad looks for "angry sad"' in out and "counts half" in " ".join(out.split())
    assert "of the index itself, it is not among the hits" in " ".join(out.split())
    assert all(name in esr("--help")[1] for name in ("index", "search", "stats", "export"))


def test_ctrl_c_leaves_a_good_index_and_says_how_to_go_on(esr, own, tmp_path, speech):
    """While the new file, a long one, is being heard; what was there stays, and the same command completes it."""
    before = contents(own)
    (tmp_path / "long").mkdir()
    with soundfile.SoundFile(tmp_path / "long" / "long.wav", "w", RATE, 1) as file:
        for _ in range(900 * RATE // len(speech)):
            file.write(speech)
    command = [sys.executable, "-m", "esr_utils.cli", "index", str(tmp_path / "long"), "--index", own]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while "long.wav" not in open_files(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: also to what it has started
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (INTERRUPTED, "") and "run the same command again to go on" in err
    assert "Traceback" not in err and contents(own) == before
    (tmp_path / "long" / "long.wav").unlink()
    soundfile.write(tmp_path / "long" / "long.wav", speech[: 5 * RATE], RATE)
    assert esr("index", tmp_path / "long", "--index", own)[0] == OK and contents(own)[1] == before[1] + 1


def test_ctrl_c_that_a_library_swallows_ends_it_all_the_same(esr, own, folder, tmp_path, monkeypatch):
    def swallowing(path, channels, moments=listening.moments):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        yield from moments(path, channels)

    monkeypatch.setattr(listening, "moments", swallowing)
    shutil.copy(folder / "call.wav", tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
    try:
        code, out, err = esr("index", tmp_path / "call.wav", "--index", own)
        assert (code, out) == (INTERRUPTED, "") and "run the same command again" in err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def open_files(pid: int) -> str:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    try:
        return " ".join(os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return ""


def test_a_closed_pipe_ends_it_without_a_word(filled, monkeypatch, capsys):
    """As `esr search ... | head -1`: who reads has had enough."""
    for arguments in (["search", QUERY, "--json", "-k", "1000"], ["stats"]):
        read, write = os.pipe()
        os.close(read)
        with open(write, "w") as closed:
            monkeypatch.setattr(sys, "stdout", closed)
            assert cli.main([*arguments, "--index", filled]) == PIPE_CLOSED
    assert capsys.readouterr().err == ""


def test_what_libraries_write_by_themselves_is_not_seen():
    code = """
import os, sys
from esr_utils.cli_progress import quiet_libraries
for _ in range(2):
    with quiet_libraries():
        os.write(2, b"of a library")
        print("of Python", file=sys.stderr)
    os.write(2, b"after\\n")
try:
    with quiet_libraries():
        raise ValueError("of Python")
except ValueError as error:
    print(error, "after", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "of Python\nafter\nof Python\nafter\nof Python after\n"


def test_what_hears_is_not_imported_where_nothing_is_new(folder, own):
    code = "import sys; from esr_utils import cli; cli.main(sys.argv[1:]); print({'torch', 'lancedb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, "index", folder, "--index", own], capture_output=True, text=True)
    assert " 0 files embedded" in f" {done.stdout}" and done.stdout.splitlines()[-1] == "{'lancedb'}", done.stderr


def test_it_is_installed_as_a_command():
    (entry,) = [one for one in metadata.entry_points(group="console_scripts") if one.name == "esr"] or [None]
    declared = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert declared == {"esr": "esr_utils.cli:main"} and (entry is None or entry.value == declared["esr"])
