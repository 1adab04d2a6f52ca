"""Which pairs are shown; the pairs themselves are tested with their alignment."""

import numpy as np
import pandas as pd
import pytest

from lib.analysis.pairs import typical_pairs


def test_typical_pairs_are_at_the_median_of_their_class():
    table = pd.DataFrame(
        {
            "image": list("abcade"),
            "class": ["Mass"] * 3 + ["Edema"] * 2 + ["Nodule"],
            "iobb": [0.1, 0.5, 0.9, 0.3, 0.3, np.nan],
        }
    )
    for given in (table, table[::-1]):
        # A tie goes to the first name; an undefined pair is no example.
        assert typical_pairs(given, "iobb").values.tolist() == [["a", "Edema", 0.3], ["b", "Mass", 0.5]]


def test_typical_pairs_average_over_runs_first():
    one = pd.DataFrame({"image": ["a", "b", "c"], "class": "Mass", "score": [0.0, 0.5, 1.0]})
    other = one.assign(score=[0.9, 0.5, 1.0])  # means: a .45, b .5, c 1
    assert typical_pairs(pd.concat([one, other]), "score")["image"].tolist() == ["b"]
    third = one.assign(score=[1.0, 0.9, 0.1])  # means: .5, .7, .55
    assert typical_pairs(pd.concat([one, third]), "score")["image"].tolist() == ["c"]


@pytest.mark.parametrize("n", [1, 3, 40, 41])
def test_pairs_spread_over_the_distribution(n):
    rng = np.random.default_rng(n)
    table = pd.DataFrame({"image": [f"{i:03d}" for i in range(n)], "class": rng.choice(["Mass", "Edema"], n)})
    table["iobb"] = rng.random(n)
    undefined = table.head(1).assign(image="none", iobb=np.nan)
    quantiles = (0.1, 0.35, 0.65, 0.9)
    found = typical_pairs(pd.concat([undefined, table]), "iobb", quantiles)
    assert list(found.columns) == ["image", "class", "iobb"] and len(found) == 4
    assert found["iobb"].is_monotonic_increasing and "none" not in set(found["image"])
    below = [(table["iobb"] <= value).mean() for value in found["iobb"]]
    np.testing.assert_allclose(below, quantiles, atol=max(0.5 / n, 1 / n - 0.1) + 1e-9)
    ends = typical_pairs(table, "iobb", (1, 0))  # in the order asked for
    assert ends["iobb"].tolist() == [table["iobb"].max(), table["iobb"].min()]


def test_a_tie_among_quantiles_goes_to_the_first_in_the_table():
    table = pd.DataFrame({"image": ["c", "b", "a", "d"], "class": "Mass", "iobb": [0.0, 0.0, 0.0, 1.0]})
    assert typical_pairs(table, "iobb", (0.25, 0.5, 0.75, 1.0))["image"].tolist() == ["c", "b", "a", "d"]
