"""The figures: arrays and tidy frames in, a matplotlib Figure out, without pyplot's global state and without touching
files.

All are made for the text width of a paper (7 inches, type of 7 points and more). One colour and one marker per loss
everywhere (Okabe-Ito, told apart in grey print by the marker). Every function requires `data_label`, what was measured
on, and prints it at the foot.
"""
# What others reach by the name of the room is imported to be there.
# ruff: noqa: F401

from lib.figures.attribution import attribution_grid, iou_by_threshold, randomisation, share_dots
from lib.figures.dose import channel_responses, convergence, dose_response
from lib.figures.features import (
    activation_distribution,
    class_boxes,
    confounder_panel,
    consistency_scatter,
    film_titles,
    films_to_show,
    marked,
    outlier_films,
    scaled_cams,
)
from lib.figures.importance import (
    class_overlap,
    importance_panels,
    loss_comparison,
    principal_curve,
    pruning_curve,
    train_test_gap,
)
from lib.figures.lenses import alignment_distributions, channel_panel, concept_distributions, loss_weights
from lib.figures.release import ages, cooccurrence, film_grid, prevalence
from lib.figures.study import cam_grid, performance
from lib.figures.style import headed, loss_styles, other_findings
from lib.figures.training import class_curves, reliability, training_curves
from lib.figures.trunk_head import change_parts
