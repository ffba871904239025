"""The `esr` command: index recordings, search them, say what an index holds, cut hits to audio files.

Results go to stdout; what went wrong, and progress where somebody watches, to stderr. Libraries are imported when a
command needs them, so that `esr --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from esr_utils.audio_folder import path_or_key, possible_keys, printable, shown
from esr_utils.cli_options import ERROR, INTERRUPTED, NOTHING, OK, PIPE_CLOSED, USAGE, parser

if TYPE_CHECKING:
    from argparse import Namespace

    import pandas as pd

    from esr_utils.index import Index

_MOST_S = 1e8  # seconds, three years: no recording is longer


class UsageError(ValueError):
    """Options that make no sense together, or in this index."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code, which `cli_options.CODES` explains."""
    options = parser().parse_args(arguments)
    if not _watched():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: progress is for who watches
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of forks: ffmpeg is one
    opened = [stream for stream in (sys.stdout, sys.stderr) if stream]  # a shell may have closed either
    for stream in opened:
        stream.reconfigure(errors="backslashreplace")  # names of any letters, in any locale
    try:
        code = {"index": _index, "search": _search, "stats": _stats, "export": _export}[options.name](options)
        for stream in opened:
            stream.flush()
        return code
    except KeyboardInterrupt:
        _say(f"interrupted; {options.goes_on}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more, and complains
        return PIPE_CLOSED
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith("lance error"):
            error = _damage(error)
        if (code := _code(error)) is None:
            raise
        _say(str(error))
        return code


def _code(error: Exception) -> int | None:
    """The exit code of an error that is the user's to mend; None of one that is ours."""
    if isinstance(error, OSError):  # IndexWriteError is one
        return ERROR
    from esr_utils.adaptation import AdaptationError
    from esr_utils.audio_folder import NoAudio
    from esr_utils.config import ConfigError
    from esr_utils.index_rows import IndexUnusable
    from esr_utils.index_snapshot import QueryError
    from esr_utils.recording_labels import LabelsError
    from esr_utils.weights import WeightsError

    if isinstance(error, UsageError | QueryError | AdaptationError):
        return USAGE
    return ERROR if isinstance(error, NoAudio | LabelsError | IndexUnusable | WeightsError | ConfigError) else None


def _damage(error: RuntimeError) -> Exception:
    """What LanceDB says of a file of an index that is gone or damaged."""
    from esr_utils.index_rows import IndexUnusable, first_line

    return IndexUnusable(f"the index cannot be read, one of its files is gone or damaged: {first_line(error)}")


def _watched() -> bool:
    """Whether somebody sees progress."""
    return bool(sys.stderr) and sys.stderr.isatty()


def _say(message: str) -> None:
    print(f"esr: {message}", file=sys.stderr)


# Commands ---------------------------------------------------------------------------------------------------


def _index(options: Namespace) -> int:
    from esr_utils import recordings
    from esr_utils.audio_folder import NoAudio
    from esr_utils.cli_progress import Bar, quiet_libraries

    if not options.index or not all(options.places):
        raise UsageError("an empty path, perhaps of a variable that is not set: name DIR and --index")
    if options.index.startswith("memory://"):
        raise UsageError(f"--index {options.index} would be gone when the command ends: name a folder, or a bucket")
    try:
        found = recordings.find(options.places, options.gone)  # before a model is loaded for nothing
    except NoAudio as error:
        raise NoAudio(f"{error}. If its recordings were removed for good, --gone drops them from the index") from None
    if missing := found.labels.missing(found.files):
        _say(f"labels name {len(missing)} files that are not there, such as {shown(missing[0])}")
    known = ("off", "all", "file", "channel", "speaker", *found.labels.names())
    if options.adapt and options.adapt not in (*known, *_columns(options.index)):
        raise UsageError(f"--adapt {options.adapt}: it is off, all, or a column, here {', '.join(known[2:])}")
    index = recordings.index_for(options.index, found, options.run, options.channels, options.adapt)
    with quiet_libraries(), Bar(shown=_watched()) as bar:
        report = recordings.refresh(index, found, bar)
    for key, reason in (report.problems | report.left_out).items():
        _say(f"{shown(key)}: {reason}")
    for sentence in report.not_adapted(index.about["adapt"]).values():
        _say(sentence)
    moments = index.files()["moments"]
    used = moments[moments > 0]
    about = {
        "embedded": report.embedded, "moments": report.moments, "speech_s": round(report.speech_s, 3),
        "unchanged": report.unchanged, "relabelled": report.relabelled, "adapted": report.adapted,
        "few_styles": report.few_styles,
        "removed": report.removed, "problems": report.problems, "left_out": report.left_out,
        "files_in_index": len(used), "moments_in_index": int(used.sum()),
    }  # fmt: skip
    if options.json:
        _print_json(about)
    else:
        print(
            f"{report.embedded} files embedded ({report.moments} moments, {report.speech_s / 3600:.2f} h of speech), "
            f"{report.unchanged} unchanged ({report.relabelled} with other labels), {report.removed} removed, "
            f"{len(report.problems) + len(report.left_out)} with problems; "
            f"{options.index} holds {about['moments_in_index']} moments of {len(used)} files"
        )
    if found.files and used.empty:
        _say(f"no file could be used, so that there is nothing to search: esr stats --index {options.index} says why")
        return ERROR
    return OK


def _columns(uri: str) -> list[str]:
    """Of the index that is there, if one is."""
    from esr_utils.index import Index
    from esr_utils.index_rows import IndexUnusable

    try:
        return list(Index.open(uri).columns())
    except IndexUnusable:
        return []


def _search(options: Namespace) -> int:
    hits = _hits(options)
    if options.json:
        _print_json(_records(hits))
    for hit in [] if options.json else _records(hits):
        channel = "" if hit["channel"] is None else f"  channel {hit['channel']}"
        below = f"{100 * hit['percentile']:.1f} % below"
        print(f"{hit['rank']:>4}  {hit['score']:.3f}  {below:>13}  {_times(hit)}{channel}  {shown(hit['file'])}")
    if hits.empty:
        _say("nothing was found")
    return NOTHING if hits.empty else OK


def _stats(options: Namespace) -> int:
    from esr_utils.index import Index

    index = Index.open(options.index)
    about, files = index.stats(), index.files()
    about["problems"] = files["problem"][files["problem"] != ""].to_dict()
    if about["adapt"] != "off":
        from esr_utils import index_adaptation

        about["adapted_to"], about["not_adapted_to"] = index_adaptation.left(index)
    if options.json:
        _print_json(about)
        return OK
    for name, value in about.items():
        if name not in ("columns", "problems", "not_adapted_to"):
            print(f"{name + ':':<21}{value:.2f}" if isinstance(value, float) else f"{name + ':':<21}{value}")
    print(f"{'columns:':<21}" + ", ".join(f"{name} ({kind})" for name, kind in about["columns"].items()))
    if about["adapt"] != "off":
        nameless = "all" if about["adapt"] == "all" else "none"
        left = [(printable(group) or nameless, why) for group, why in about["not_adapted_to"].items()]
        _print_reasons("not_adapted_to", left)
    _print_reasons("problems", [(shown(key), why) for key, why in about["problems"].items()])
    return OK


def _print_reasons(name: str, reasons: list[tuple[str, str]]) -> None:
    print(f"{name + ':':<21}{len(reasons)}")
    for one, why in reasons:
        print(f"  {one}: {why}")


def _export(options: Namespace) -> int:
    from esr_utils import clips
    from esr_utils.cli_progress import quiet_libraries

    if not options.to:
        raise UsageError("an empty path, perhaps of a variable that is not set: name --to")
    hits = _hits(options) if _has_query(options) else _read_hits(options)
    if hits.empty:
        _say("nothing was found, so there is nothing to cut")
        return NOTHING
    with quiet_libraries():
        table = clips.export(hits, options.to)
    bad = table[table["problem"] != ""]
    for key, reason in zip(bad["file"], bad["problem"], strict=True):
        _say(f"{shown(key)}: {reason}")
    print(f"{len(table) - len(bad)} of {len(table)} hits cut to {options.to}")
    return ERROR if len(bad) else OK


# Queries ----------------------------------------------------------------------------------------------------


def _has_query(options: Namespace) -> bool:
    return bool(options.sentence or options.like)


def _hits(options: Namespace) -> pd.DataFrame:
    if not _has_query(options):
        raise UsageError('say what is looked for: esr search "a tired, sarcastic answer", or --like FILE')
    if not options.index:
        raise UsageError("say in which index: --index PATH")
    if options.like and (options.sentence or options.minus):
        raise UsageError("--like takes no sentence beside it, and no --minus")
    index = _open(options)
    where = {}
    for condition in options.where:
        column, values = _condition(condition, index)
        where.setdefault(column, []).extend(values)
    rest = {
        "where": {column: values if len(values) > 1 else values[0] for column, values in where.items()},
        "one_per": options.one_per, "offset": options.offset,
    }  # fmt: skip
    if options.like:
        from esr_utils.cli_progress import quiet_libraries

        with quiet_libraries():
            return index.search_like(options.like, options.k, options.min_score, **rest)
    return index.search(_sentences(options.sentence), options.k, options.min_score, minus=options.minus, **rest)


def _open(options: Namespace) -> Index:
    from esr_utils import recordings

    return recordings.open_index(options.index, run=options.run)[0]


def _sentences(words: list[str]) -> list[str]:
    """Words that a shell took apart, for want of quotes, are one sentence."""
    return [" ".join(words)] if all(len(word.split()) == 1 for word in words) else words


def _condition(condition: str, index: Index) -> tuple[str, list[Any]]:
    """`column=value`, or `column=low..high` of a column of numbers, to what `Index.search` takes, one of which is to
    hold."""
    column, equals, text = condition.partition("=")
    kinds = {name: str(kind) for name, kind in index.columns().items()}
    if not equals:
        raise UsageError(f"--where {condition}: write column=value, or column=low..high of numbers")
    if column not in kinds:
        raise UsageError(f"--where {condition}: there is no column {column!r}; this index has {', '.join(kinds)}")
    kind = kinds[column]
    if column == "file":
        return column, _keys(text, index)
    if kind == "string":
        return column, [text]
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise UsageError(f"--where {condition}: {column} is true or false")
        return column, [text.lower() == "true"]
    low, dots, high = text.partition("..")
    try:
        if not dots:
            return column, [float(text)]
        return column, [tuple(float(bound) if bound else None for bound in (low, high))]
    except ValueError:
        raise UsageError(f"--where {condition}: {column} is a number; write 3, 3..5, 3.. or ..5") from None


def _keys(path: str, index: Index) -> list[str]:
    """The file at a path, as the index names it; also by that name, and by the path as hits are printed with it, which
    may be that of several."""
    keys, files = possible_keys(path), index.files().index
    known = [key for key in files if key in keys | {path}] or [key for key in files if shown(key) == path]
    return known or sorted(keys)


def _read_hits(options: Namespace) -> pd.DataFrame:
    """What `esr search --json` wrote, from stdin."""
    import pandas as pd

    if options.minus or options.where or options.one_per or options.offset or options.k != 10 or options.min_score > -1:
        raise UsageError("hits are cut as they come: -k, --where and the like are for a query; give them to esr search")
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("give a query, or pipe what esr search --json prints")
    try:
        found = json.load(sys.stdin)
        valid = isinstance(found, list) and all(isinstance(hit, dict) and _is_hit(hit) for hit in found)
        table = pd.DataFrame(found).drop(columns="path", errors="ignore")  # which may hold bytes that are no UTF-8
        table.to_csv().encode()  # as other text must not
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise UsageError("stdin is not what esr search --json prints: a list with file, start_s, end_s and channel")
    return table


def _is_hit(hit: dict[str, Any]) -> bool:
    times, channel = [hit.get(name) for name in ("start_s", "end_s")], hit.get("channel")
    return (
        isinstance(hit.get("file"), str)
        and all(time is None or type(time) in (int, float) and 0 <= time < _MOST_S for time in times)
        and (channel is None or type(channel) is int and 0 <= channel < 1 << 16)
    )


# What is printed --------------------------------------------------------------------------------------------


def _records(hits: pd.DataFrame) -> list[dict[str, Any]]:
    """Hits as JSON has them, each with the path of its file."""
    records = json.loads(hits.to_json(orient="records", double_precision=6))
    for hit in records:
        hit["channel"] = None if hit["channel"] is None else int(hit["channel"])
        hit["path"] = path_or_key(hit["file"])
    return records


def _times(hit: dict[str, Any]) -> str:
    return "whole file" if hit["start_s"] is None else f"{_clock(hit['start_s'])} - {_clock(hit['end_s'])}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{rest:04.1f}"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))  # in ASCII: no locale changes it


if __name__ == "__main__":
    sys.exit(main())
