"""The papers' tables in the papers' own arrangement, ours beside theirs: tidy frames in, frames and text out, no file
written."""
# What others reach by the name of the room is imported to be there.
# ruff: noqa: F401

from lib.tables import li, li_words, nam_lee
from lib.tables.khakzar import (
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
from lib.tables.names import BACKBONES, LOSSES, TASKS, display, ordered
from lib.tables.verdicts import cells_markdown, claim_sentences, claim_table, readings_markdown
