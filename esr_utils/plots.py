"""Figures and players for notebooks: each function takes tables or arrays and returns a figure, or HTML to listen
to."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
from IPython.display import HTML
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from esr_utils.batches import load_waveform
from esr_utils.config import SAMPLE_RATE
from esr_utils.manifests import to_cuts
from esr_utils.styles import STYLES

# One colour a style in every figure: hues around the circle, alternately light and dark.
COLOURS = {
    style: colour
    for style, colour in zip(
        STYLES,
        [
            c
            for pair in zip(sns.husl_palette(11, l=0.45), sns.husl_palette(11, h=0.05, l=0.72), strict=True)
            for c in pair
        ],
        strict=True,
    )
}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG at 150 dpi, makes its folder, and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def training_curves(metrics: list[dict]) -> Figure:
    """Loss terms over the epochs of `runs.read_metrics`, train and validation, with the stages shaded."""
    table = pd.DataFrame(metrics)
    terms = [t for t in ("classification", "contrastive", "adversarial") if f"train_{t}" in table]
    figure, axes = plt.subplots(1, len(terms), figsize=(4 * len(terms), 3.2), squeeze=False, layout="constrained")
    for axis, term in zip(axes[0], terms, strict=True):
        for side, style in (("train", "--"), ("val", "-")):
            if f"{side}_{term}" in table:
                axis.plot(table["epoch"], table[f"{side}_{term}"], style, label=side)
        for i, (stage, part) in enumerate(table.groupby("stage", sort=False)):
            axis.axvspan(
                part["epoch"].min() - 0.5, part["epoch"].max() + 0.5, color="grey", alpha=0.05 + 0.06 * i, lw=0
            )
            axis.annotate(stage, (part["epoch"].min(), 1.01), xycoords=("data", "axes fraction"), fontsize=7)
        axis.set(xlabel="epoch", title=term + "\n", ylabel="loss")
        axis.legend(frameon=False)
    return figure


def durations(manifest: pd.DataFrame) -> Figure:
    """How long the clips of each corpus are."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    sns.histplot(manifest, x="duration_s", hue="corpus", bins=40, multiple="stack", ax=axis)
    axis.set(xlabel="duration (s)", ylabel="clips")
    return figure


def recall_by_style(per_style: pd.DataFrame, metric: str = "r@10") -> Figure:
    """Bars of one metric per style, seen beside held-out prompts, one panel a corpus (`Evaluation.per_style`)."""
    corpora = per_style["corpus"].unique()
    figure, axes = plt.subplots(
        1, len(corpora), figsize=(1.5 + 0.34 * 22 * len(corpora), 3.4), squeeze=False, layout="constrained"
    )
    for axis, corpus in zip(axes[0], corpora, strict=True):
        part = per_style[per_style["corpus"] == corpus]
        sns.barplot(part, x="style", y=metric, hue="prompts", ax=axis, palette=["#33658a", "#f6ae2d"])
        fewest, most = part["n_candidates"].min(), part["n_candidates"].max()
        size = f"1-in-{most}" if fewest == most else f"1-in-{fewest} to {most}"
        axis.set(title=f"{corpus}: {metric} per style, {size}", xlabel="", ylabel=metric, ylim=(0, 1))
        axis.tick_params(axis="x", rotation=60)
        axis.legend(frameon=False, title="prompts", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def confusion(counts: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix, rows normalised: of the clips of a style, the share found as each."""
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    size = 2.2 + 0.36 * len(counts)
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    small = len(counts) > 12
    sns.heatmap(
        shares,
        vmin=0,
        vmax=1,
        cmap="mako_r",
        annot=True,
        fmt=".1f" if small else ".2f",
        ax=axis,
        annot_kws={"fontsize": 6 if small else 8},
        cbar_kws={"label": "share of the style's clips"},
    )
    axis.set(title=title, xlabel="style found", ylabel="true style")
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
        return UMAP(metric="cosine", n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(vectors)
    raise ValueError(f"method is {method!r}; it must be 'tsne' or 'umap'")


def joint_map(points: NDArray, styles: list[str], modality: list[str], title: str) -> Figure:
    """Two kinds of vectors in one plane, a colour a style: the first as dots, the other as crosses (ESR Fig. 4)."""
    frame = pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "style": styles, "modality": modality})
    present, kinds = [style for style in STYLES if style in set(styles)], list(dict.fromkeys(modality))
    figure, axis = plt.subplots(figsize=(8.4, 6.2), layout="constrained")
    for style in present:
        part = frame[frame["style"] == style]
        dots, crosses = part[part["modality"] == kinds[0]], part[part["modality"] != kinds[0]]
        axis.scatter(dots["x"], dots["y"], s=12, color=COLOURS[style], alpha=0.65, lw=0, label=style)
        axis.scatter(crosses["x"], crosses["y"], s=46, color=COLOURS[style], marker="X", edgecolor="black", lw=0.5)
    axis.set(title=f"{title}\ndots: {kinds[0]}, crosses: {kinds[-1]}".replace("_", "-"), xticks=[], yticks=[])
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=2)
    return figure


def players(hits: pd.DataFrame, query: str = "") -> HTML:
    """Manifest rows, or search hits, as a table with a player each (at most 30 s, level normalised, FLAC)."""
    columns = [name for name in ("rank", "score", "style", "text", "utterance_id") if name in hits]
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


def modality_gap(speech: NDArray, text: NDArray) -> float:
    """Distance between the centroids of speech and text vectors (Liang et al. 2022): 0 where they share one place."""
    return float(np.linalg.norm(speech.mean(axis=0) - text.mean(axis=0)))
