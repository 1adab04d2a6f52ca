"""The page: a study to explore in a browser, in one file that asks for nothing else."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from lib.explorer.gather import gather
from lib.records import write_text
from lib.runs import OpenStudy, open_study

TEMPLATE = Path(__file__).with_name("page.html")
HEIGHT = 860  # of its frame in a notebook, pixels


@dataclass(frozen=True)
class Page:
    """A page made by `explore`: `html` is all of it, scripts, maps and films. In a notebook it shows itself."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write it, atomically; RecordError where it cannot be written."""
        write_text(self.html, path)

    def _repr_html_(self) -> str:
        # In a frame of its own origin: neither can reach into the other.
        frame = f'title="The study to explore" width="100%" height="{HEIGHT}" style="border:1px solid #d9d9d9"'
        return f'<iframe sandbox="allow-scripts" {frame} srcdoc="{html.escape(self.html)}"></iframe>'


def explore(study: OpenStudy | str, *, films: bool = False, most: int = 200) -> Page:
    """A study's maps, scores and channels as one self-contained page, `explore(study).save("explore.html")`.

    The losses' maps of a film side by side with live thresholds, the scatter of every loss against BCE, the films that
    excite single channels, and the matrix of trunks and heads where notebook 09 has run. It needs the trained runs
    alone: one forward pass each, over the films with boxes.

    Parameters
    ----------
    study : OpenStudy or str
        An opened study, see `runs.open_study`, or the name of one.
    films : bool
        Whether the pixels of real films go into the page. Those of simulated films always do; without, maps and boxes
        are drawn on a plain ground.
    most : int
        At most so many films with boxes, evenly spread over the release; the page says how many there are.

    Raises
    ------
    ValueError
        `most` is less than 1.
    ParameterError, TrainingError, ReleaseError
        No such study, none of its runs is trained, or no film that is analysed has a box.
    """
    if most < 1:
        raise ValueError(f"most is {most}; a page shows at least 1 film")
    data = gather(open_study({"study": study}) if isinstance(study, str) else study, films=films, most=most)
    # A film's name may hold what would end the script; it is plain text everywhere else.
    held = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8").replace("@study@", html.escape(data["study"]))
    return Page(template.replace("@data@", held))
