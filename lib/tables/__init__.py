"""The papers' tables in the papers' own arrangement, ours beside theirs: tidy frames in, frames and text out, no file
written."""

from lib.tables import li, nam_lee
from lib.tables.khakzar import (
    BASELINE,
    caption,
    differences_to_bce,
    read_published,
    statement_sentences,
    statements,
    table1,
    table2,
    to_latex,
    to_markdown,
)
from lib.tables.layout import long_metrics
from lib.tables.names import BACKBONES, LOSSES, METRICS, MISSING, TASKS, display, ordered

__all__ = [
    "BACKBONES",
    "BASELINE",
    "LOSSES",
    "METRICS",
    "MISSING",
    "TASKS",
    "caption",
    "differences_to_bce",
    "display",
    "li",
    "long_metrics",
    "nam_lee",
    "ordered",
    "read_published",
    "statement_sentences",
    "statements",
    "table1",
    "table2",
    "to_latex",
    "to_markdown",
]
