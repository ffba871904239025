"""Figures and players for notebooks: each function takes tables or arrays and returns a figure, or HTML to listen
to."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from esr_utils.batches import load_waveform
from esr_utils.config import SAMPLE_RATE
from esr_utils.manifests import to_cuts
from esr_utils.runs import atomic_path
from esr_utils.styles import STYLES

# One colour a style in every figure. The styles that most corpora have are dark, as far apart as eleven hues can be,
# with neighbouring hues by turns darker, so that a map of a few styles can be read; the others are light.
_FREQUENT = (
    "angry", "bored", "happy", "disgusted", "fearful", "calm", "whispered", "sad", "neutral", "laughing", "surprised",
)  # fmt: skip
COLOURS = {
    **{style: sns.husl_palette(11, l=0.38 + 0.2 * (i % 2))[i] for i, style in enumerate(_FREQUENT)},
    **dict(zip([s for s in STYLES if s not in _FREQUENT], sns.husl_palette(11, h=0.05, l=0.76), strict=True)),
}

_NO_STYLE = (0.6, 0.6, 0.6)
_SYSTEM_COLOURS = {"seen": "#33658a", "held_out": "#f6ae2d", "classifier": "#8f8f8f"}
SYSTEM_NAMES = {"seen": "seen prompts", "held_out": "held-out prompts", "classifier": "style classifier"}
_STAGE_COLOURS = {"classify": "#dce6f2", "align": "#e3f0dc", "adversarial": "#f8e6da"}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG at 150 dpi to `path`, and an SVG beside it, each atomically; makes their folder, and returns `path`.

    The same figure gives the same SVG, byte for byte.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    with atomic_path(path.with_suffix(".svg")) as temporary, plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    return path


def training_curves(metrics: list[dict]) -> Figure:
    """Loss terms over the epochs of `runs.read_metrics`, train and validation, with the stages in colour."""
    table = pd.DataFrame(metrics)
    terms = [t for t in ("classification", "contrastive", "adversarial") if f"train_{t}" in table]
    figure, axes = plt.subplots(1, len(terms), figsize=(4 * len(terms) + 1.2, 3.2), squeeze=False, layout="constrained")
    for axis, term in zip(axes[0], terms, strict=True):
        for side, style in (("train", "--"), ("val", "-")):
            if f"{side}_{term}" in table:
                axis.plot(table["epoch"], table[f"{side}_{term}"], style, label=side)
        for stage, part in table.groupby("stage", sort=False):
            first, last = part["epoch"].min() - 0.5, part["epoch"].max() + 0.5
            axis.axvspan(first, last, color=_STAGE_COLOURS[stage], lw=0, zorder=0)
        axis.set(xlabel="epoch", title=term, ylabel="loss", xlim=(table["epoch"].min() - 0.5, last))
        axis.legend(frameon=False)
    stages = [Patch(color=_STAGE_COLOURS[stage], label=stage) for stage in table["stage"].unique()]
    figure.legend(handles=stages, title="stage", frameon=False, loc="outside right center")
    return figure


def validation_curves(metrics: dict[str, list[dict]]) -> Figure:
    """The contrastive loss on the validation split by epoch, a panel a run: title -> lines of metrics.jsonl."""
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    size = {"figsize": (3.2 * columns, 2.5 * rows), "squeeze": False, "sharex": True, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **size)
    for axis, (title, lines) in zip(axes.flat, metrics.items(), strict=False):
        epochs = [line["epoch"] for line in lines]
        for name, style in (("val_contrastive", "-"), ("train_contrastive", ":")):
            if all(name in line for line in lines):  # there may be no validation split
                axis.plot(epochs, [line[name] for line in lines], style, color="C0", label=name.split("_")[0])
        axis.set(title=title, xlabel="epoch", ylabel="contrastive loss")
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    axes[0, 0].legend(frameon=False)
    return figure


def durations(manifest: pd.DataFrame) -> Figure:
    """How long the clips of each corpus are."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    sns.histplot(manifest, x="duration_s", hue="corpus", bins=40, multiple="stack", ax=axis)
    axis.set(xlabel="duration (s)", ylabel="clips")
    return figure


def recall_by_style(per_style: pd.DataFrame, metric: str = "r@10") -> Figure:
    """Bars of one metric per style with its 95 % interval, a colour a system, one panel a corpus.

    Args:
        per_style: of an `Evaluation`. In brackets after a style stands how many clips it has.
    """
    corpora, systems = per_style["corpus"].unique(), per_style["system"].unique()
    widths = [2.4 + 0.4 * per_style.loc[per_style["corpus"] == corpus, "style"].nunique() for corpus in corpora]
    figure, axes = plt.subplots(
        1, len(corpora), figsize=(sum(widths) + 1.2, 3.6), squeeze=False, layout="constrained", width_ratios=widths
    )
    width = 0.8 / len(systems)
    for axis, corpus in zip(axes[0], corpora, strict=True):
        part = per_style[per_style["corpus"] == corpus]
        for i, system in enumerate(systems):
            rows = part[part["system"] == system]
            places = np.arange(len(rows)) + (i - (len(systems) - 1) / 2) * width
            bounds = rows[[f"{metric} low", f"{metric} high"]].to_numpy()
            _bars(axis, places, rows[metric].to_numpy(), bounds, width, _SYSTEM_COLOURS[system], SYSTEM_NAMES[system])
        fewest, most = part["n_candidates"].min(), part["n_candidates"].max()
        size = f"1-in-{most}" if fewest == most else f"1-in-{fewest} to {most}"
        name = metric.replace("r@", "R@").replace("map@", "mAP@")
        axis.set(title=f"{corpus}: {name} per style, {size}", xlabel="style (clips)", ylabel=name, ylim=(0, 1.02))
        labels = [f"{style} ({n})" for style, n in zip(rows["style"], rows["clips"], strict=True)]
        axis.set_xticks(range(len(rows)), labels, rotation=50, ha="right", rotation_mode="anchor")
        axis.set_xlim(-0.6, len(rows) - 0.4)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, title="ranked by", loc="outside right center")
    return figure


def _bars(axis, places: NDArray, values: NDArray, bounds: NDArray, width: float, colour, label: str) -> None:
    """Bars with their intervals (N, 2), drawn apart, so that a bar of 0 shows its interval too."""
    axis.bar(places, values, 0.9 * width, color=colour, label=label)
    spread = [values - bounds[:, 0], bounds[:, 1] - values]
    axis.errorbar(places, values, spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)


def confusion(counts: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix, rows normalised: of the clips of a style, the percentage found as each; blank is below 0.5."""
    shares = 100 * counts.div(counts.sum(axis=1).clip(lower=1e-9), axis=0)
    size = 2.4 + 0.38 * len(counts)
    figure, axis = plt.subplots(figsize=(size + 1.0, size), layout="constrained")
    sns.heatmap(
        shares,
        vmin=0,
        vmax=100,
        cmap="Blues",
        annot=shares.map(lambda share: f"{share:.0f}" if share >= 0.5 else ""),
        fmt="",
        square=True,
        linewidths=0.4,
        linecolor="0.85",
        ax=axis,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "% of the style's clips", "shrink": 0.7},
    )
    axis.set(title=title, xlabel="style found", ylabel="true style (clips)")
    plt.setp(axis.get_xticklabels(), rotation=50, ha="right", rotation_mode="anchor")
    clips = counts.sum(axis=1).round().astype(int)
    axis.set_yticklabels([f"{style} ({n})" for style, n in clips.items()], rotation=0)
    return figure


def layer_weights(weights: NDArray, backbone: str) -> Figure:
    """What the learned mix reads: one bar a layer of the speech backbone."""
    figure, axis = plt.subplots(figsize=(4, 2.6), layout="constrained")
    axis.bar(range(len(weights)), weights, color="#33658a")
    axis.set(xlabel="layer (0 = before the transformer)", ylabel="weight", title=f"layer mix, {backbone}")
    axis.set_xticks(range(len(weights)))
    return figure


def project_2d(vectors: NDArray, method: str, seed: int = 0) -> NDArray:
    """(N, d) unit vectors -> (N, 2) by `tsne` (van der Maaten & Hinton 2008) or `umap` (McInnes et al. 2018), cosine.

    Raises:
        ValueError: another method, or fewer than 5 vectors.
    """
    if len(vectors) < 5:
        raise ValueError(f"{len(vectors)} vectors are too few for a map; at least 5 are needed")
    if method == "tsne":
        perplexity = min(30.0, (len(vectors) - 1) / 4)
        return TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors)
    if method == "umap":
        from umap import UMAP  # compiles for seconds, so only where it is used

        neighbours = min(15, len(vectors) - 1)
        # numba raises the number of OpenMP threads for good, past OMP_NUM_THREADS; torch was twenty times slower then.
        with threadpool_limits(limits=1, user_api="openmp"):
            return UMAP(metric="cosine", n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(vectors)
    raise ValueError(f"method is {method!r}; it must be 'tsne' or 'umap'")


def joint_map(points: NDArray, styles: list[str], modality: list[str], title: str) -> Figure:
    """Two kinds of vectors in one plane, a colour a style: the first as dots, the other as crosses (ESR Fig. 4)."""
    return _maps({title: (points, pd.DataFrame({"style": styles, "modality": modality}))})


def joint_maps(spaces: dict[str, tuple[NDArray, pd.DataFrame]], method: str, seed: int = 0) -> Figure:
    """A `joint_map` of each space beside the other: title -> what `evaluation.joint_space` returns.

    A title says the method, and which epoch a space is of where that is known (`spaces.joint_spaces`).
    """
    named = {"tsne": "t-SNE", "umap": "UMAP"}.get(method, method)
    maps = {}
    for title, (vectors, about) in spaces.items():
        lines = [f"{title}, {named}", about.attrs.get("checkpoint", "")]
        maps["\n".join(filter(None, lines))] = project_2d(vectors, method, seed), about
    return _maps(maps)


def _maps(maps: dict[str, tuple[NDArray, pd.DataFrame]]) -> Figure:
    figure, axes = plt.subplots(1, len(maps), figsize=(1.6 + 6.4 * len(maps), 6.2), squeeze=False, layout="constrained")
    for axis, (title, (points, about)) in zip(axes[0], maps.items(), strict=True):
        kinds = about["modality"].unique()
        colours, first = (
            np.array([COLOURS.get(s, _NO_STYLE) for s in about["style"]]),
            (about["modality"] == kinds[0]).to_numpy(),
        )
        axis.scatter(*points[first].T, color=colours[first], s=12, alpha=0.65, lw=0)
        axis.scatter(*points[~first].T, color=colours[~first], s=46, marker="X", edgecolor="black", lw=0.5)
        counted = f"{first.sum()} dots: {kinds[0]}, {(~first).sum()} crosses: {kinds[-1]}"
        axis.set(title=f"{title}\n{counted}".replace("_", "-"), xticks=[], yticks=[])
    named = {style for _, about in maps.values() for style in about["style"]}
    handles = [Line2D([], [], ls="", marker="o", color=COLOURS[s], label=s) for s in STYLES if s in named]
    figure.legend(handles=handles, frameon=False, loc="outside right center", fontsize=9)
    return figure


def recall_by_duration(table: pd.DataFrame, protocols: dict[str, str], ks: tuple[int, ...] = (1, 5)) -> Figure:
    """Bars of Recall@k by the duration of the clip to be found (ESR Fig. 3).

    A row of panels a corpus, a bar a model with its 95 % interval; below each bin its clips. An empty bin says so.

    Args:
        table: of `comparison.duration_table`.
        protocols: of `comparison.protocols`, for the titles.
    """
    corpora, models, bins = (table.index.unique(level) for level in ("corpus", "model", "duration"))
    size = (1.5 + 4.6 * len(ks), 0.9 + 2.9 * len(corpora) + 0.2 * len(models))
    figure, axes = plt.subplots(len(corpora), len(ks), figsize=size, squeeze=False, layout="constrained", sharey=True)
    width = 0.8 / len(models)
    for row, corpus in zip(axes, corpora, strict=True):
        clips = table.loc[(corpus, models[0])]["clips"]
        for axis, k in zip(row, ks, strict=True):
            for m, model in enumerate(models):
                cells = table.loc[(corpus, model)][f"R@{k}"]
                known = [i for i, found in enumerate(cells) if found != ""]
                values = np.array([cells.iloc[i].value for i in known])
                bounds = np.array([cells.iloc[i].interval for i in known]).reshape(-1, 2)
                places = np.array(known) + (m - (len(models) - 1) / 2) * width
                _bars(axis, places, values, bounds, width, sns.color_palette("colorblind")[m % 10], model)
            for i in np.flatnonzero(clips == 0):
                axis.text(i, 0.03, "no clips", rotation=90, ha="center", va="bottom", color="0.35")
            axis.set_xticks(range(len(bins)), [f"{name}\nn = {n}" for name, n in zip(bins, clips, strict=True)])
            axis.set(title=f"{corpus}: R@{k}, {protocols[corpus]}", ylim=(0, 1.02), xlim=(-0.6, len(bins) - 0.4))
        row[0].set_ylabel("Recall@k")
    for axis in axes[-1]:
        axis.set_xlabel("duration of the clip to be found")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center")
    return figure


def similarities(clips: pd.DataFrame, threshold: float) -> Figure:
    """How like its speaker's other clips each clip is (FS-CLAP Eq. 5), with the threshold.

    Args:
        clips: of `mining.mine`; clips that are their speaker's only one have no similarity, and are counted apart.
    """
    known = clips["similarity"].dropna()
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.hist(known, bins=np.linspace(0, 1, 41), color="#33658a")
    axis.axvline(
        threshold, color="#c1121f", lw=1.5, label=f"threshold {threshold:g} (mean cosine {2 * threshold - 1:.2f})"
    )
    axis.set(xlabel="mean of (cos + 1) / 2 to the speaker's other clips", ylabel="clips", xlim=(0, 1))
    left, alone = int((known < threshold).sum()), int(clips["similarity"].isna().sum())
    axis.set_title(
        f"{len(known)} clips, {left} below the threshold; not shown: {alone}, too short or alone", fontsize=10
    )
    axis.legend(frameon=False, loc="upper left")
    return figure


def timeline(clips: pd.DataFrame, truth: Sequence[str] | None = None, seconds: float = 300.0) -> Figure:
    """Who speaks when in one file: a row a speaker that was found, a bar a clip; pale: left out.

    Args:
        clips: of `mining.mine`, of one file; what begins after `seconds` is not drawn.
        truth: who really speaks in each clip, which gives it its colour; None: not known.
    """
    who = list(truth) if truth is not None else ["clip"] * len(clips)
    colours = dict(zip(dict.fromkeys(who), sns.color_palette("colorblind", len(set(who)) or 1), strict=False))
    drawn = [(clip, name) for clip, name in zip(clips.itertuples(), who, strict=True) if clip.start_s < seconds]
    names = list(dict.fromkeys(clip.speaker for clip, _ in drawn))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.3 * max(len(names), 2)), layout="constrained")
    for clip, name in drawn:
        place = names.index(clip.speaker) - 0.4, 0.8
        alpha = 0.3 if clip.left_out else 1.0
        axis.broken_barh([(clip.start_s, clip.end_s - clip.start_s)], place, color=colours[name], alpha=alpha)
    axis.set_yticks(range(len(names)), [name.rsplit("-", 1)[-1] for name in names])
    axis.set(xlabel="seconds", ylabel="speaker found", ylim=(len(names) - 0.4, -0.6))
    if truth is not None:
        handles = [Patch(color=colour, label=name or "nobody") for name, colour in colours.items()]
        figure.legend(handles=handles, title="true speaker", frameon=False, loc="outside right center")
    return figure


def players(hits: pd.DataFrame, query: str = "") -> HTML:
    """Manifest rows, or search hits, as a table with a player each (at most 30 s, level normalised, FLAC)."""
    columns = [name for name in ("rank", "score", "style", "caption", "text", "utterance_id") if name in hits]
    if "caption" in hits and (hits["caption"] == "").all():
        columns.remove("caption")
    rows = []
    cuts = {cut.custom["utterance_id"]: cut for cut in to_cuts(hits)}
    for hit in hits.to_dict("records"):
        cut = cuts[hit["utterance_id"]]
        waveform = load_waveform(cut.truncate(duration=min(cut.duration, 30.0))).clamp(-1, 1)
        sound = io.BytesIO()
        soundfile.write(sound, waveform.numpy(), SAMPLE_RATE, format="FLAC")
        source = "data:audio/flac;base64," + base64.b64encode(sound.getvalue()).decode()
        shown = [f"{hit[name]:.2f}" if name == "score" else str(hit[name]) for name in columns]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in shown)
        rows.append(f'<tr>{cells}<td><audio controls preload="none" src="{source}"></audio></td></tr>')
    head = "".join(f"<th>{name}</th>" for name in (*columns, "listen"))
    title = f"<b>{html.escape(query)}</b>" if query else ""
    return HTML(f"{title}<table><tr>{head}</tr>{''.join(rows)}</table>")


def leak(experiment: pd.DataFrame, on: str = "pure noise") -> Figure:
    """R@1 by each protocol, before and after naive training (`leakage`); what it is `on` stands in the titles.

    Bars with their 95 % intervals; the line is chance, where on noise every protocol should be that cannot see the
    answer.
    """
    moments, names = sorted(experiment["steps"].unique()), list(dict.fromkeys(experiment["protocol"]))
    size = {"figsize": (5.2 * len(moments), 3.6), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(moments), **size)
    for axis, steps in zip(axes[0], moments, strict=True):
        for d, (direction, label) in enumerate((("a2t", "audio to text"), ("t2a", "text to audio"))):
            part = experiment[(experiment["steps"] == steps) & (experiment["direction"] == direction)]
            part = part.set_index("protocol").loc[names]
            places, bounds = np.arange(len(names)) + (d - 0.5) * 0.4, part[["low", "high"]].to_numpy()
            _bars(axis, places, part["r@1"].to_numpy(), bounds, 0.38, f"C{d}", label)
        axis.axhline(experiment["chance"].iloc[0], color="black", lw=0.8, ls="--", label="chance")
        axis.set_xticks(range(len(names)), [f"{name}\n(leaky)" if name == "matched" else name for name in names])
        axis.set(title=f"{on}, after {steps} training steps" if steps else f"{on}, untrained")
    axes[0, 0].set(ylabel="R@1", ylim=(0, 1.02))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure
