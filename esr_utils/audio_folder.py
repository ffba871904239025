"""A folder of recordings: which files it holds, and names for them that can be written anywhere and turned back.

A file name on disk is any bytes but "/" and NUL, while a table, JSON or a database takes only UTF-8: a `file_key` is
the path below the folder with "/" between its parts, where bytes that are no UTF-8, and "%" itself, are written %XX.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

PLAIN = (".wav", ".flac", ".ogg", ".opus", ".mp3")  # read without ffmpeg
_MPEG4 = (".m4a", ".m4b", ".aac", ".m4p", ".aax")  # the last two are mostly protected: found, so that it is said
AUDIO = (*PLAIN, *_MPEG4, ".oga", ".wma", ".aiff", ".aif", ".caf", ".w64", ".amr", ".ac3", ".mka")
VIDEO = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv", ".ts", ".m4v", ".wmv", ".mpg", ".mpeg", ".3gp")


class NoAudio(ValueError):
    """A folder without recordings; the message says what was looked for."""


def find_audio(folder: str | Path, gone: bool = False) -> tuple[list[tuple[str, Path]], list[tuple[str, str]]]:
    """Audio and video files below a folder, by the ending of their names, or one file of any name.

    Hidden files and folders (names that begin with ".") are passed over. Links are not followed to folders: one within
    the folder is found under its own name, and so a loop of links has no end to look for. A link to a file is listed,
    unless that file is already under its own name or another link. What leads outside of the folder is left out: a
    stray link would otherwise bring in a whole disk. Name the place it leads to instead.

    Args:
        gone: whether there may be none, or no such folder any more.

    Returns:
        Key and absolute path of each file, once, in the order of the paths; and key and reason of what was left out.
    Raises:
        NoAudio: there is no such folder, or nothing to be used in it, and `gone` is false.
    """
    root = absolute(folder)
    if root.is_file():
        return [(_key(Path(root.name)), root)], []
    if not root.is_dir():
        if gone:
            return [], []
        raise NoAudio(f"{printable(folder)} is no file and no folder: give a recording, or a folder of them")
    files, links, left_out = _walk(root)
    seen = set(files)  # a file that is no link, in a folder reached through none, is where its path says
    for link in sorted(links):
        if (target := Path(os.path.realpath(link))) in seen:
            continue
        if reason := _unusable(target, root):
            left_out[link] = reason
        elif target.is_file():
            seen.add(target)
            files.append(link)
    reasons = [(_key(path.relative_to(root)), left_out[path]) for path in sorted(left_out)]
    if not files and not gone:
        said = "".join(f"; {printable(key)}: {reason}" for key, reason in reasons[:3])
        raise NoAudio(f"{printable(folder)} holds no audio; known are {', '.join((*AUDIO, *VIDEO))}{said}")
    return [(_key(path.relative_to(root)), path) for path in sorted(files)], reasons


def _walk(root: Path) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """Files, links to look into, and reasons for what cannot be read."""
    files, links, left_out, waiting = [], [], {}, [root]
    suffixes = {*AUDIO, *VIDEO}
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            left_out[folder] = f"cannot be opened: {error.strerror}"
            continue
        for entry in shown:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() and (path.suffix.lower() in suffixes or os.path.isdir(path)):
                links.append(path)
            elif path.suffix.lower() in suffixes and entry.is_file(follow_symlinks=False):
                files.append(path)
            elif path.suffix.lower() in suffixes:
                left_out[path] = "is no file"  # a pipe, a device: to open it may take for ever
    return files, links, left_out


def _unusable(target: Path, root: Path) -> str:
    if not target.is_relative_to(root):
        return "is a link that leads outside of the folder"
    if target.is_dir():
        hidden = any(part.startswith(".") for part in target.relative_to(root).parts)
        return "is a link to a hidden folder" if hidden else ""
    return "" if target.is_file() else "is a link that leads nowhere"


def file_key(path: str | Path, root: str | Path) -> str:
    """The name of a file of `find_audio` in a table: the same wherever the folder is, and valid UTF-8.

    Args:
        root: the folder that was given to `find_audio`; of one file that was given, the key is its name.
    Raises:
        ValueError: the file is not below it.
    """
    return _key(Path(path).relative_to(_folder(root)))


def _key(inside: Path) -> str:
    name = os.fsencode(inside.as_posix()).decode("utf-8", "surrogateescape")
    return re.sub("[%\udc80-\udcff]", lambda found: f"%{ord(found[0]) & 0xFF:02X}", name)


def path_of(key: str, root: str | Path) -> Path:
    """The file that a `file_key` stands for, whether it is there or not.

    Raises:
        ValueError: no file below `root` has this key, such as one that is absolute or has "..".
    """
    folder, raw = _folder(root), key.encode("utf-8", "replace")
    name = re.sub(rb"%([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()), raw)
    inside = Path(os.fsdecode(name))
    if b"\0" in name or inside.is_absolute() or ".." in inside.parts or not inside.parts or _key(inside) != key:
        raise ValueError(f"{key!r} is the name of no file below {printable(folder)}")
    return folder / inside


def absolute_key(path: str | Path) -> str:
    """The name of a file, or of a folder, in a table that holds several folders: "/" and its `file_key` below that.

    It is the absolute path itself, unless there is a "%" in it or what is no UTF-8. Links are not followed.
    """
    inside = file_key(os.path.abspath(path), "/")
    return "/" if inside == "." else f"/{inside}"


def possible_keys(path: str | Path) -> set[str]:
    """Under these a file may be in a table, as a folder is gone through with the links to it followed."""
    path = at_home(path)
    found = {absolute_key(path)}
    with suppress(ValueError):  # a null byte is in no file's name
        found |= {absolute_key(Path(os.path.realpath(path.parent), path.name)), absolute_key(os.path.realpath(path))}
    return found


def absolute_path(key: str) -> Path:
    """The file that an `absolute_key` stands for, whether it is there or not.

    Raises:
        ValueError: no file has this key.
    """
    return path_of(key.removeprefix("/"), "/")


def path_or_key(key: str) -> str:
    """Where the file of an `absolute_key` is; in a table that another program filled, its name there."""
    try:
        return str(absolute_path(key))
    except ValueError:
        return key


def shown(key: str) -> str:
    """The same for people to read."""
    return printable(path_or_key(key))


def printable(path: str | Path) -> str:
    """A path for people to read on one line: what cannot be printed or encoded is replaced."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(path))


def at_home(path: str | Path) -> Path:
    """A path in which ~ is the user's home, as a shell leaves it in --index=~/my.index."""
    with suppress(RuntimeError):  # there is no such user: a name that begins so
        return Path(path).expanduser()
    return Path(path)


def absolute(root: str | Path) -> Path:
    """A path from the root, links followed.

    Raises:
        NoAudio: it is a link that leads back to itself.
    """
    root = at_home(root)
    try:
        return root.resolve()
    except (RuntimeError, OSError) as error:
        raise NoAudio(f"{printable(root)} leads nowhere: {error}") from None


def _folder(root: str | Path) -> Path:
    root = absolute(root)
    return root.parent if root.is_file() else root
