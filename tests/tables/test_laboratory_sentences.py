"""The laboratory's words follow from its numbers."""

import pandas as pd

from lib.tables.laboratory import NAMES, SHOWN, causal_sentences, response_sentences


def contrasts(*points, reach=0.01, loss="wbce", metric="ior"):
    frame = pd.DataFrame({"point": points}).assign(loss=loss, metric=metric)
    return frame.assign(low=frame["point"] - reach, high=frame["point"] + reach)


def test_each_way_is_counted_where_the_interval_leaves_out_0():
    (sentence,) = response_sentences(contrasts(0.2, 0.02, 0.005, -0.03), ["ior"])
    assert sentence == "**WBCE**: IoR higher in 2 of 4 and lower in 1 of 4 (-0.030 to +0.200)."
    (sentence,) = response_sentences(contrasts(0.005, 0.005), ["ior"])
    assert sentence == "**WBCE**: IoR told apart in none of 2 (+0.005)."


def test_a_line_a_loss_and_every_metric_in_it():
    frame = pd.concat([contrasts(0.2), contrasts(-0.2, loss="focal"), contrasts(-0.2, metric="auroc")])
    first, second = response_sentences(frame, ["auroc", "ior"])
    assert first == "**WBCE**: AUROC lower in 1 of 1 (-0.200); IoR higher in 1 of 1 (+0.200)."
    assert second.startswith("**Focal**") and "IoR lower in 1 of 1" in second


def test_where_nothing_can_be_compared_that_is_said():
    assert response_sentences(contrasts().iloc[:0], ["ior"]) == ["No two runs differ in this alone."]


def test_one_seed_is_no_test():
    frame = contrasts(0.2, 0.3).assign(low=float("nan"), high=float("nan"))
    assert response_sentences(frame, ["ior"]) == ["**WBCE**: IoR of one seed, so not tested (+0.200 to +0.300)."]


def test_shares_are_means_over_noise_with_an_interval_over_seeds():
    rows = [(1.0, "survive", 0, 0.6), (1.0, "survive", 0, 0.8), (1.0, "survive", 1, 0.5), (1.0, "survive", 1, 0.7)]
    rows += [(0.1, "survive", seed, 0.9) for seed in (0, 1)]
    shares = {"responds_counted": 0.25, "responds_uncounted": 0.1}
    rows += [(dose, name, seed, share) for dose in (1.0, 0.1) for name, share in shares.items() for seed in (0, 1)]
    frame = pd.DataFrame(rows, columns=["prevalence", "metric", "seed", "value"]).assign(loss="bce")
    first, second = causal_sentences(frame, frame[frame["seed"] == 0].query("prevalence == 1"))
    # 65 %, and 12.706 times .05: Student's with one degree of freedom
    assert first == (
        "**BCE**: with 1 of the findings left, 65% [1, 129] of the counts stand without it, and it moves 25% [25, 25] "
        "of the counted channels and 10% [10, 10] of others; with 0.1 of the findings left, 90% [90, 90] of the counts "
        "stand without it, and it moves 25% [25, 25] of the counted channels and 10% [10, 10] of others."
    )
    assert second.startswith("**Untrained**: 70% [—] of the counts stand without it")


def test_what_is_shown_has_a_name():
    assert set(NAMES) < set(SHOWN) and not set(SHOWN) & set(SHOWN.values())
    assert all(len(line) <= 14 for label in SHOWN.values() for line in label.split("\n"))
