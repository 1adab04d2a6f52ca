"""A finished study by hand: one self-contained page that needs no kernel, and the widgets of notebook 10."""

from lib.explorer.page import Page, explore

__all__ = ["Page", "explore"]
