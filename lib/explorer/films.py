"""What the widgets of notebook 10 hold: a study's films, what the networks of all its losses make of one of them, and
the order in which a person wants to see them."""

import warnings
from collections.abc import Hashable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from lib import records
from lib.analysis import cam
from lib.analysis.alignment import align, pooled_maps
from lib.analysis.dissection.quantile import StreamingQuantile
from lib.analysis.features.masking import masked_logits
from lib.analysis.features.survey import evenly
from lib.analysis.inference import LensError, Output, predict, stream
from lib.analysis.localization import positive_part, soft_overlap
from lib.analysis.model_cams import METHODS as CAM_METHODS
from lib.analysis.model_cams import model_cams
from lib.analysis.pairs import box_pairs
from lib.analysis.relevance.heatmaps import METHODS as RELEVANCE_METHODS
from lib.analysis.relevance.heatmaps import heatmaps
from lib.data.batches import Batch, evaluation_batches
from lib.data.decoding import decode_film, read_film
from lib.data.release import UNHEALTHY, film_boxes, printable
from lib.runs import Subject

SIDE = 256  # of a film to look at, pixels
RECENT = 48  # films whose feature maps are kept
LISTED = 12  # channels of a class
SURVEYED = 400  # films, at most, that all channels are read on
ACCEPTED = "square grey or colour films as .png, .jpg, .jpeg or .dcm, of 16 to 8,192 pixels a side"
# Behind a head that pools and is linear these are CAM times a constant, so the same map on a scale of its own.
ALIKE = ("grad", "xgrad", "hires")
METHODS = tuple(method for method in CAM_METHODS if method not in ALIKE) + RELEVANCE_METHODS


class Scores(NamedTuple):
    """What every loss says of every film, DataFrames with a row for each (image, class) and a column for each loss:
    `p`, the probability, of all test films and of those with boxes; `iobb` and `hit` of the latter, else NaN."""

    p: pd.DataFrame
    iobb: pd.DataFrame
    hit: pd.DataFrame


class Survey(NamedTuple):
    """One network's channels over N films: `rows` int (N,), `pooled` float32 (N, F), the means of the maps that the
    head reads, and the thresholds `tau` float32 (F,) that the run's share q of a channel's values reaches."""

    rows: np.ndarray
    pooled: torch.Tensor
    tau: np.ndarray


class Film:
    """A film, and what the networks of all losses make of it, which is computed when it is first asked for and kept.

    Attributes
    ----------
    name, labels : str
        Of its file, and 'A|B'.
    picture : uint8 (SIDE, SIDE)
        To look at.
    boxes : DataFrame
        class, x1, y1, x2, y2: of all findings, by their own names, in pixels of the films that the networks see.
    """

    def __init__(
        self,
        name: str,
        labels: str,
        picture: np.ndarray,
        boxes: pd.DataFrame,
        batch: Batch,
        subjects: dict[str, Subject],
    ):
        self.name, self.labels, self.picture, self.boxes = name, labels, picture, boxes
        self.batch, self.subjects = batch, subjects
        self.signed = lru_cache(None)(self._signed)

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """Logits and feature maps of the film alone, by loss."""
        passes = {
            loss: stream(one.model, [self.batch], [one.layer], one.run.token_grid)
            for loss, one in self.subjects.items()
        }
        return {loss: next(outputs) for loss, outputs in passes.items()}

    def p(self, loss: str, output: int) -> float:
        """The probability that a network gives it."""
        return torch.sigmoid(self.outputs[loss].logits[0, output].double()).item()

    def asked(self, name: str) -> pd.Series:
        """Which of `boxes` are of a class of the task, bool: every box is one of Unhealthy."""
        return (self.boxes["class"] == name) | (name == UNHEALTHY)

    def corners(self, name: str) -> np.ndarray:
        """The corners of these boxes, float64 (K, 4)."""
        return self.boxes.loc[self.asked(name), ["x1", "y1", "x2", "y2"]].to_numpy(float)

    def _signed(self, loss: str, output: int, method: str) -> torch.Tensor:
        """The map of one of `METHODS` for one output, signed, float32 (h, w) at its own size: that of the feature maps,
        or the film's for relevance. NaN where relevance has no stable map."""
        one, seen = self.subjects[loss], self.outputs[loss]
        model, run = one.model, one.run
        if method in RELEVANCE_METHODS:
            rules = {"init": run.relevance_init, "batchnorm": run.relevance_batchnorm, "negative": run.rap_negative}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of maps that are not stable: they are NaN, which is drawn as such
                return heatmaps(model, self.batch.images, torch.tensor([output]), method, **rules)[0].cpu()
        if method in cam.METHODS:
            maps = pooled_maps(seen, one.layer, model.head)
            return cam.class_activation_maps(maps, model.head.weight[[output]], method)[0, 0].cpu()
        found = model_cams(model, self.batch.images, one.layer, [output], method, token_grid=run.token_grid)
        return found.maps[0, 0].cpu()


class Lightbox:
    """The films of a study and the trained networks of all losses, for one task, backbone and seed.

    Parameters
    ----------
    subject : Subject
        One of these runs, opened.

    Attributes
    ----------
    subjects : dict of str to Subject
        By loss.
    """

    def __init__(self, subject: Subject):
        self.subject, self.subjects = subject, subject.siblings
        self.film, self.survey = lru_cache(RECENT)(self._film), lru_cache(None)(self._survey)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Every (film, class) with boxes, of `pairs.box_pairs`; empty where the release has no boxes."""
        one = self.subject
        return box_pairs(one.films.loc[one.rows(one.run.annotated)], one.boxes, one.classes)

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each film that is looked at, by its name: the test films and those with boxes."""
        rows = np.union1d(self.subject.rows("test"), self.pairs["row"].to_numpy(np.int64))
        return dict(zip(self.subject.films.loc[rows, "image"], rows.tolist()))

    @cached_property
    def scores(self) -> Scores:
        """From the tables of 02 and 03 where they are there, else by the same functions that make those."""
        found = {loss: self._tables(one) for loss, one in self.subjects.items()}
        p = pd.DataFrame({loss: expit(pd.concat(both)["logit"].groupby(level=[0, 1]).first().astype(float))
                          for loss, both in found.items()})  # fmt: skip
        placed = {
            name: pd.DataFrame({loss: alignment[name] for loss, (_, alignment) in found.items()}).reindex(p.index)
            for name in ("iobb", "hit")
        }
        return Scores(p, **placed)

    def _tables(self, one):
        """Predictions of the test films and alignment of the pairs of one run, by (image, class)."""
        keys = ["image", "class"]
        path = one.path("predictions.parquet")
        if path.is_file():
            predictions = records.read_table(path)
        else:
            rows = one.rows("test")
            logits = pd.DataFrame(predict(one.model, one.batches(rows)), one.films.loc[rows, "image"], one.classes)
            predictions = logits.rename_axis(columns="class").stack().rename("logit").reset_index()
        path = one.path("cam_alignment.parquet")
        if path.is_file():
            alignment = records.read_table(path)
        elif len(self.pairs):
            outputs = stream(one.model, one.batches(self.pairs["row"].unique()), [one.layer], one.run.token_grid)
            options = {"method": one.run.cam_method, "rounding": one.run.box_rounding}
            alignment = align(
                outputs, self.pairs, one.model.head, layer=one.layer, image_size=one.run.image_size, **options
            )
        else:
            alignment = pd.DataFrame(columns=[*keys, "logit", "iobb", "hit"]).astype({"logit": float})
        return predictions.set_index(keys), alignment.set_index(keys)

    def has(self, name: str) -> pd.Series:
        """Whether each film has the finding, bool by image, by the labels of the release."""
        column = self.subject.classes.index(name)
        rows = list(self.rows.values())
        return pd.Series(self.subject.targets[rows, column] == 1, index=list(self.rows))

    def _film(self, image: str) -> Film:
        """One of the study's films, by its name."""
        one, row = self.subject, self.rows[image]
        boxes = one.release.boxes[one.release.boxes["image"] == image]
        boxes = film_boxes(boxes, one.run.image_size)[["class", "x1", "y1", "x2", "y2"]]
        (batch,) = one.batches([row], 1)
        labels = one.films.loc[row, "labels"]
        return Film(image, labels, one.images([row], SIDE)[0], boxes, batch, self.subjects)

    def own_film(self, path: str, content: bytes | None = None) -> Film:
        """A film from elsewhere, read as those of a release are: the same file gives the same maps.

        Parameters
        ----------
        path : str
            Its file, or with `content` its name.
        content : bytes, optional
            The whole file.

        Raises
        ------
        LensError
            It cannot be read; the message names the file, what is wrong, and what is accepted.
        """
        one, name = self.subject, printable(Path(path).name)
        try:
            stored, picture = (
                read_film(path, side) if content is None else decode_film(content, side, Path(path).suffix)
                for side in (one.store.size, SIDE)
            )
        except ValueError as error:
            raise LensError(f"{name}: {error}. Accepted are {ACCEPTED}") from None
        alone = SimpleNamespace(images=stored[None], size=one.store.size)
        options = {"image_size": one.run.image_size, "batch_size": 1, "device": one.device}
        (batch,) = evaluation_batches(alone, np.zeros(1, np.int64), np.zeros((1, len(one.classes))), **options)
        none = pd.DataFrame(columns=["class", "x1", "y1", "x2", "y2"])
        return Film(name, "", picture, none, batch, self.subjects)

    # ---- channels

    def _survey(self, loss: str) -> Survey:
        """All channels of one network over the test films, of more than `SURVEYED` as many evenly."""
        one = self.subjects[loss]
        rows = evenly(one.rows("test"), SURVEYED)
        quantile, pooled = StreamingQuantile(one.dissection[1], len(rows), one.layer), []
        for output in stream(one.model, one.batches(rows), [one.layer], one.run.token_grid):
            maps = pooled_maps(output, one.layer, one.model.head).cpu()
            quantile.update(maps)
            pooled.append(maps.mean((2, 3)))
        return Survey(rows, torch.cat(pooled), quantile.result().tau)

    def importance(self, loss: str, name: str) -> tuple[pd.DataFrame, str]:
        """What each channel adds to a class, by channel: `all` (Li et al., eq. 3) and `own`, over films of the class
        alone (eq. 4); and where this is from: of training films, by 07, or else of the films surveyed here."""
        one = self.subjects[loss]
        path = one.path("importance.parquet")
        if path.is_file():
            table = records.read_table(path).query("method == 'grad' and `class` == @name").set_index("feature")
            return table[["train", "train_own"]].set_axis(["all", "own"], axis=1), "training films, notebook 07"
        seen, column = self.survey(loss), one.classes.index(name)
        added = (seen.pooled * one.model.head.weight[column].detach().cpu()).double().numpy()
        has = one.targets[seen.rows, column] == 1
        means = {"all": added.mean(0), "own": added[has].mean(0) if has.any() else np.full(added.shape[1], np.nan)}
        return pd.DataFrame(means), f"{len(seen.rows)} test films"

    def principal(self, loss: str, name: str, reading: str) -> pd.Series:
        """What the `LISTED` channels that add most to a class add to it, the most first, by channel: on 'all' films, or
        ('contrast') on films of the class beyond that. LensError where there is none of those."""
        table, source = self.importance(loss, name)
        if reading == "contrast" and table["own"].isna().all():
            raise LensError(f"no film of {name} is among the {source}: choose the channels that add most on all films")
        added = table["all"] if reading == "all" else table["own"] - table["all"]
        return added.sort_values(ascending=False, kind="stable").head(LISTED)

    def without(self, loss: str, name: str, channels: Sequence[int]) -> pd.DataFrame:
        """A class's probability before and after some channels are set to 0: before, after, has (the finding), by
        image, of the films surveyed."""
        one, seen = self.subjects[loss], self.survey(loss)
        column, head = one.classes.index(name), one.model.head
        kept = torch.ones(2, head.in_features)
        kept[1, list(channels)] = 0
        weights, bias = (part.detach().cpu()[[column, column]] for part in (head.weight, head.bias))
        p = expit(masked_logits(seen.pooled, weights, bias, kept).double().numpy())
        has = one.targets[seen.rows, column] == 1
        images = pd.Index(one.films.loc[seen.rows, "image"])
        return pd.DataFrame({"before": p[:, 0], "after": p[:, 1], "has": has}, index=images)


# ---- maps and scores


def unit_maps(signed: torch.Tensor, method: str, common: bool = False) -> torch.Tensor:
    """Signed maps (L, h, w) as they are drawn, in [0, 1]: each on its own scale, as the tables have them (03 for CAMs,
    06 for relevance), or with `common` all divided by the largest value of any. NaN becomes 0."""
    signed = signed.nan_to_num(0)
    if common:
        signed = signed.clamp(min=0)
        return signed / signed.max().clamp(min=torch.finfo(signed.dtype).tiny)
    return positive_part(signed) if method in RELEVANCE_METHODS else cam.normalise(signed)


def overlap(units: torch.Tensor, boxes: np.ndarray, run, threshold: float | None = None) -> pd.DataFrame:
    """`localization.soft_overlap` of several maps of one film with the same boxes, a row a map; with a `threshold` of
    the masks that reach it."""
    options = {"rounding": run.box_rounding, "threshold": threshold}
    return soft_overlap(units, [boxes] * len(units), run.image_size, **options)


# ---- order


def order(scores: Scores, name: str, by: str) -> pd.Series:
    """The films of a class by one of `orders`, the highest first; a tie goes to the name.

    'iobb' and 'p' are means over the losses. 'iobb apart' is the largest minus the smallest IoBB of any loss, 'p apart'
    the same of the film's place in each loss's own order of probabilities, from 0 to 1: that a loss lifts all of them
    is no disagreement about a film.
    """
    measure, _, apart = by.partition(" ")
    values = getattr(scores, measure).xs(name, level="class").dropna()
    if apart and measure == "p":
        values = values.rank(pct=True)
    found = values.max(axis=1) - values.min(axis=1) if apart else values.mean(axis=1)
    return found.sort_index().sort_values(ascending=False, kind="stable")


def orders(scores: Scores, name: str) -> list[str]:
    """What the films of a class can be ordered by: not by IoBB without boxes, nor by disagreement of one loss."""
    several = ["", " apart"] if scores.p.shape[1] > 1 else [""]
    boxed = name in scores.iobb.dropna().index.get_level_values("class")
    return [measure + apart for measure in (["iobb"] if boxed else []) + ["p"] for apart in reversed(several)]


def failures(scores: Scores, has: pd.Series, name: str, loss: str) -> dict[str, list[Hashable]]:
    """Where a network is wrong, or right for the wrong place: images by the kind of failure, the worst first.

    As many films are called as have the finding, those of the highest probability; so a loss that lifts all
    probabilities has no more false alarms for it. 'missed': has it and is not called; 'false alarm': is called and does
    not have it; 'wrong place': is called rightly, and the map's largest value lies outside of all boxes.
    """
    p = scores.p[loss].xs(name, level="class").sort_index().sort_values(ascending=False, kind="stable")
    has = has.reindex(p.index)
    called = pd.Series(np.arange(len(p)) < has.sum(), index=p.index)
    hit = scores.hit[loss].xs(name, level="class").reindex(p.index)
    return {
        "missed": list(p.index[has & ~called][::-1]),
        "false alarm": list(p.index[called & ~has]),
        "wrong place": list(p.index[called & has & (hit < 0.5)]),
    }
