"""From what is asked of an index to a vector: sentences, vectors, audio files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from numpy.typing import NDArray

from esr_utils.audio_files import AudioError
from esr_utils.audio_folder import at_home, printable
from esr_utils.config import Level
from esr_utils.decoding import read_spans
from esr_utils.index_snapshot import QueryError, is_text

if TYPE_CHECKING:
    from esr_utils.retriever import Retriever

MAX_EXAMPLE_S = 60.0  # seconds of an audio file that is looked for
MAX_QUERY = 2000  # characters of a sentence: some 400 words, more than a text backbone reads
Query = str | Sequence[str] | NDArray[np.floating]


def unit(vector: NDArray[np.float32], otherwise: str = "the query vector is zero") -> NDArray[np.float32]:
    """A vector at unit length; QueryError says `otherwise` of one that has none."""
    length = float(np.linalg.norm(vector))
    if length < 1e-6:
        raise QueryError(otherwise)
    return vector / np.float32(length)


def of_query(query: Query, model: Retriever | None, dim: int) -> NDArray[np.float32]:
    """The unit vector (dim,) of a sentence, of the mean of several's, or of a vector.

    Raises:
        QueryError: it is empty, longer than MAX_QUERY, no vector of this width, zero, or needs a model.
    """
    if isinstance(query, np.ndarray):
        if query.shape != (dim,) or not np.isfinite(query).all():
            raise QueryError(f"a query vector of this index is ({dim},) finite numbers; this one is {query.shape}")
        return unit(query.astype(np.float32))
    sentences = [query] if isinstance(query, str) else list(query)
    if not sentences or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise QueryError("the query is empty: describe how the speech should sound, e.g. 'an angry, shouting voice'")
    for sentence in sentences:
        if len(sentence) > MAX_QUERY:
            raise QueryError(
                f"the query is {len(sentence)} characters ({len(sentence.split())} words) long; "
                f"at most {MAX_QUERY} are taken: describe how the speech should sound in a sentence or two"
            )
        if not is_text(sentence):
            raise QueryError(f"the query {sentence!r} holds bytes that are no UTF-8: write it anew")
    if model is None:
        raise QueryError("this index was opened without a model, which sentences need: Index.open(uri, model)")
    import torch  # with a model it is there already

    with torch.no_grad():
        return unit(model.encode_text(sentences).float().mean(0).cpu().numpy())


def of_file(path: Path, model: Retriever | None, level: Level) -> NDArray[np.float32]:
    """The unit vector (d,) of a whole audio file of any kind; its channels are averaged.

    Raises:
        QueryError: it is not there, cannot be read, is silent, too short, or longer than MAX_EXAMPLE_S, or there is no
            model.
    """
    from lhotse import CutSet, Recording

    from esr_utils.embedding import embed

    path = at_home(path)
    if not os.path.isfile(path):  # pathlib's raises on a name that is too long
        raise QueryError(f"{printable(path)} is neither the id of a moment of this index nor an audio file")
    if model is None:
        raise QueryError("this index was opened without a model, which an audio file needs: Index.open(uri, model)")
    recording = Recording.from_bytes(_as_wav(path), str(path))
    if recording.duration > MAX_EXAMPLE_S:
        raise QueryError(
            f"{printable(path)} is longer than {MAX_EXAMPLE_S:g} s, which an example lasts at most: cut out the part "
            "that sounds as it should"
        )
    cut = recording.to_cut()  # of all channels, which are averaged
    cut.custom = {"utterance_id": str(path), "style": ""}
    found = embed(model, CutSet.from_cuts([cut]), level, cache=None)
    if not len(found.vectors):
        raise QueryError(f"{path}: {found.skipped['reason'].iloc[0]}")
    return found.vectors[0]


def _as_wav(path: Path) -> bytes:
    """A file of any kind as WAV, in memory, or a little more of it than may be looked for."""
    wav = io.BytesIO()
    try:
        (samples,), rate = read_spans(path, [(0.0, MAX_EXAMPLE_S + 1)])
    except AudioError as error:
        raise QueryError(f"{printable(path)} is no readable audio file: it {error}") from None
    soundfile.write(wav, samples, rate, format="WAV", subtype="FLOAT")
    return wav.getvalue()
