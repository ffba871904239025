"""Options of the `esr` command, its help, and what its exit codes mean."""

from __future__ import annotations

import argparse
from typing import Any

OK, ERROR, USAGE, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130
PIPE_CLOSED = 141  # as a shell has it of a program that SIGPIPE ended

CODES = """
exit codes:
  0    done; found
  1    error: no audio, or none that can be used, no such index or run, another model's index, the disk is full;
       the index stays good
  2    a wrong option, or a query that cannot be answered: empty, too long, of a column that is not there
  3    nothing was found
  130  interrupted (Ctrl-C); what was written stays, and the same command goes on
"""
INDEX = """
Folders are gone through with all below them: wav, flac, ogg, opus, mp3, and with ffmpeg m4a, mp4, mkv and more.
Speech is cut into moments of 1 to 10 s. Run it again at any time: only what is new or changed is embedded, what is
gone is dropped, and what was interrupted is completed. A labels.csv in a folder, with a column path, gives the moments
of its files columns such as speaker; rows with start_s and end_s tell of a part of a file. A DIR that is not there, or
holds no audio at all, is an error, as its disk may not be mounted: --gone says that it was removed for good.

examples:
  esr index ~/podcast --index podcast.index
  esr index calls/2025 calls/2026 --index calls.index --channels split    # one party a channel
  esr index ~/podcast --index s3://bucket/podcast --run acted             # by the retriever of runs/acted
"""
QUERY = """
A sentence stands in quotes; of several the average is looked for. Single words are one sentence, with quotes or
without: angry sad looks for "angry sad", and "an angry voice" "a sad voice" for the average of both.

examples:
  esr search "a tired, sarcastic answer" --index podcast.index
  esr search "excited" --minus "angry" --where speaker=anna --where start_s=60..600 --index podcast.index
  esr search "whispering" "half asleep" --one-per file -k 20 --json --index podcast.index | jq -r .[].path
  esr search --like example.wav --min-score 0.3 --index podcast.index
"""
EXPORT = """
The folder is new or empty. It gets one WAV file a hit, and hits.csv.

examples:
  esr export "a tired, sarcastic answer" -k 20 --index podcast.index --to tired
  esr search "excited" --index podcast.index --json | jq '.[:3]' | esr export --to excited
"""


def parser() -> argparse.ArgumentParser:
    """What it makes of a command line has `name`, of the command, and `goes_on`, what is said when that is stopped."""

    def command(name: str, about: str, more: str, goes_on: str = "nothing was changed") -> Any:
        made = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".", epilog=more + CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(name=name, goes_on=goes_on)
        return made

    esr = argparse.ArgumentParser(
        "esr", description="Search recordings by how something is said.", epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = esr.add_subparsers(required=True, metavar="COMMAND")

    index = command(
        "index", "make an index of recordings, or bring it up to date", INDEX,
        "what was written stays: run the same command again to go on",
    )  # fmt: skip
    index.add_argument("places", nargs="+", metavar="DIR", help="a folder of recordings, or a recording")
    index.add_argument("--index", required=True, metavar="PATH", help="where the index is, or will be")
    index.add_argument(
        "--run",
        help="run whose retriever is used: a name below runs/, or a folder (default: that of the index, "
        "and models/esr-tiny for a new one)",
    )
    index.add_argument(
        "--channels", choices=["mix", "split"],
        help="listen to all channels together, or to each by itself, as for calls (default: as the index does; mix "
        "in a new one)",
    )  # fmt: skip
    index.add_argument(
        "--adapt", metavar="BY",
        help="make vectors by the statistics of what the index holds: of 'all' of it, or of each value in a column, as "
        "speaker; 'off': by those of the training (default: as the index does; a new one by speaker, where a "
        "labels.csv names one, else off)",
    )  # fmt: skip
    index.add_argument(
        "--gone", action="store_true",
        help="a DIR that is not there, or holds no audio, was removed for good: drop its recordings from the index",
    )  # fmt: skip
    index.add_argument("--json", action="store_true", help="print what was done as JSON")

    search = command("search", "find moments by a sentence, or by an example", QUERY)
    _add_query(search)
    search.add_argument("--json", action="store_true", help="print a JSON list of the hits, with all columns")

    stats = command("stats", "say what an index holds, and which files could not be used", "")
    stats.add_argument("--index", required=True, metavar="PATH", help="where the index is")
    stats.add_argument("--json", action="store_true", help="print it as JSON")

    goes_on = "what was cut stays"
    export = command("export", "cut hits to audio files, with a CSV", EXPORT, goes_on)
    _add_query(export)
    export.add_argument("--to", required=True, metavar="FOLDER", help="a new or empty folder")
    return esr


def _add_query(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sentence", nargs="*", help="how it should sound, in plain words")
    add("--index", metavar="PATH", help="where the index is")
    add("--run", help="run whose retriever made the index, where it is no longer at its place")
    add("-k", type=int, default=10, metavar="N", help="hits (default: 10)")
    add("--like", metavar="FILE_OR_ID", help="an example in place of a sentence: an audio file of up to a "
        "minute, or the id of a moment; of the index itself, it is not among the hits")  # fmt: skip
    add("--minus", metavar="SENTENCE", help="how it should not sound, which counts half as much as the sentence")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep what has this value (of file: "
        "this path), or one from LOW..HIGH (either may be left out); of several for one column any, of several columns "
        "all")  # fmt: skip
    add("--min-score", type=float, default=-1.0, metavar="S", help="leave out what scores below this cosine, -1 to 1")
    add("--one-per", metavar="COLUMN", help="only the best of each file, speaker, ...")
    add("--offset", type=int, default=0, metavar="N", help="hits to skip: -k 10 --offset 10 is the second page")
