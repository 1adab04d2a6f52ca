"""The plan that is in the repository, and what is made of one."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import yaml

from lib.flat_yaml import ParameterError
from lib.params import PLAN
from lib.plan import chance_spread, claimed, decide, deciding_losses, judge, load_plan, record_claims


def effects(*rows):
    cell = {"task": "multilabel", "backbone": "tdensenet", "loss": "wbce", "seeds": True}
    return pd.DataFrame(rows, columns=["claim", "point", "se", "df"]).assign(**cell)


def written(tmp_path, **changes):
    plan = yaml.safe_load(PLAN.read_text()) | changes
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return load_plan(tmp_path / "plan.yaml")


def test_the_plan_of_the_repository_is_whole():
    plan = load_plan()
    assert plan.written.year >= 2026 and plan.digest == hashlib.sha256(PLAN.read_bytes()).hexdigest()[:16]
    assert {"khakzar_1", "khakzar_2", "khakzar_3", "khakzar_4", "nam_lee", "li", "prior_shift", "trunk"} <= {
        claim.family for claim in plan.claims.values()
    }
    # Two claims about one metric and one comparison would be one claim counted twice.
    keys = [(claim.metric, claim.against) for claim in plan.claims.values()]
    assert len(set(keys)) == len(keys)
    # Equivalence that is expected can be shown, and a margin belongs to a claim.
    alike = {claim.metric for claim in plan.claims.values() if claim.expected == "equivalent"}
    assert alike <= plan.margins.keys() <= {claim.metric for claim in plan.claims.values()}


def test_a_claim_that_was_not_written_down_is_refused():
    with pytest.raises(ParameterError, match="has no claim gamma_up: a claim is written there before the runs"):
        judge(load_plan(), "nih_part", effects(("gamma_up", 0.1, 0.01, 10), ("iobb_up", 0.1, 0.01, 10)))


def test_outcomes_follow_from_what_was_expected(tmp_path):
    plan = written(tmp_path, margins={"auroc": 0.02, "iobb": 0.02})
    rows = [
        ("iobb_up", 0.5, 0.01, 50, "different", "holds"),
        ("auroc_alike", 0.001, 0.001, 50, "equivalent", "holds"),
        ("probability_up", -0.5, 0.01, 50, "different", "contradicted"),
        ("ior_down", 0.001, 0.1, 50, "undecided", "undecided"),
        ("shift_gives_iobb", 0.5, 0.01, 50, "different", "contradicted"),
        ("trunk_iobb", 0.01, 0.2, 50, "undecided", "undecided"),
    ]
    found = judge(plan, plan.study, effects(*(row[:4] for row in rows)))
    assert list(found["verdict"]) == [row[4] for row in rows] and list(found["outcome"]) == [row[5] for row in rows]
    assert found.loc[0, "source"] == "Khakzar et al. 3" and found.loc[0, "margin"] == 0.02


def test_a_difference_that_was_expected_and_is_none_contradicts(tmp_path):
    plan = written(tmp_path, margins={"iobb": 0.02})
    assert judge(plan, plan.study, effects(("iobb_up", 0.001, 0.001, 50)))["outcome"].item() == "contradicted"


def test_cells_that_decide_are_corrected_by_themselves():
    plan = load_plan()
    weak = effects(("iobb_up", 2.2, 1.0, np.inf))  # p = .028: enough alone, not among three
    others = pd.concat([weak.assign(task="binary"), weak.assign(backbone="resnet50")])
    every = pd.concat([weak, others], ignore_index=True)
    found = judge(plan, plan.study, every)
    assert list(found["confirmatory"]) == [True, False, False] and list(found["tests"]) == [1, 2, 2]
    assert list(found["verdict"]) == ["different", "undecided", "undecided"]
    elsewhere = judge(plan, "demo", every)
    assert not elsewhere["confirmatory"].any() and list(elsewhere["tests"]) == [3, 3, 3]


def test_one_seed_decides_nothing():
    plan = load_plan()
    found = judge(
        plan, plan.study, effects(("iobb_up", 0.5, 0.01, 50), ("iobb_up", 0.5, 0.01, 50)).assign(seeds=[True, False])
    )
    assert list(found["confirmatory"]) == [True, False] and list(found["tests"]) == [1, 1]


def test_a_claim_holds_where_every_loss_says_so():
    plan, losses = load_plan(), ("bce", "wbce", "focal")
    sure, not_sure, against = 0.5, 0.012, -0.5
    rows = {
        "iobb_up": (sure, sure), "auprc_alike": (sure, not_sure), "ior_down": (not_sure, against),
        "probability_up": (sure, 0.06), "hit_alike": (not_sure,),
    }  # fmt: skip
    table = effects(
        *((name, point, 0.01 if point != 0.06 else 5.0, 50) for name, several in rows.items() for point in several)
    )
    table["loss"] = ["wbce", "focal"] * 4 + ["wbce"]
    lens = effects(("cam_not_untrained", sure, 0.01, 50), ("lrp_sharper", sure, 0.01, 50)).assign(loss=["bce", "wbce"])
    table = pd.concat([table, lens], ignore_index=True)
    decided = decide(plan, judge(plan, plan.study, table), losses)
    assert list(decided.index) == list(plan.claims)
    assert decided[list(rows)].tolist() == ["holds", "contradicted", "undecided", "undecided", "incomplete"]
    assert decided[["cam_not_untrained", "lrp_sharper"]].tolist() == ["holds", "incomplete"]  # of BCE's it is asked
    assert decided["ap_alike"] == "not judged"
    assert set(decide(plan, judge(plan, "demo", table), losses)) == {"not judged"}
    assert set(decide(plan, judge(plan, plan.study, table.assign(seeds=False)), losses)) == {"not judged"}


def test_the_losses_that_decide_are_those_of_the_plans_study():
    assert deciding_losses(load_plan()) == ["bce", "wbce", "focal", "cb_focal"]


def test_what_chance_alone_changes():
    null = pd.DataFrame({"metric": ["auroc", "iobb", "auroc", "auroc"], "difference": [0.03, -0.1, -0.01, 0.5]})
    null = null.assign(task=["multilabel"] * 3 + ["binary"], backbone="tdensenet")
    spread = chance_spread(null)
    assert spread["multilabel", "tdensenet"].to_dict() == pytest.approx(
        {"auroc": np.sqrt((0.03**2 + 0.01**2) / 2), "iobb": 0.1}
    )
    assert spread["binary", "tdensenet"]["auroc"] == 0.5 and np.isnan(spread["binary", "tdensenet"]["iobb"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"margins": {"auroc": 0}}, "margins.auroc"),
        ({"claims": {"x": {"says": "y"}}}, "claims.x.source"),
        ({"written": "soon"}, "written"),
        ({"more": 1}, "more"),
    ],
)
def test_a_plan_that_is_none_is_refused_by_its_key(tmp_path, change, key):
    with pytest.raises(ParameterError, match=f"plan.yaml: {key}: "):
        written(tmp_path, **change)


def test_two_claims_about_one_comparison_are_refused(tmp_path):
    claims = yaml.safe_load(PLAN.read_text())["claims"]
    with pytest.raises(ParameterError, match="two claims are about iobb against bce"):
        written(tmp_path, claims=claims | {"again": claims["iobb_up"]})


def test_a_file_that_is_no_plan(tmp_path):
    for text in ("- a\n- b\n", "a: [", ""):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(ParameterError, match="plan.yaml: not a plan in yaml"):
            load_plan(tmp_path / "plan.yaml")
    with pytest.raises(ParameterError, match="no such file"):
        load_plan(tmp_path / "none.yaml")


def test_effects_find_their_claims_by_metric_and_opponent():
    plan = load_plan()
    found = pd.DataFrame({"metric": ["iobb", "auroc", "nothing"], "point": [1.0, 2.0, 3.0]})
    assert claimed(plan, found, "bce")[["claim", "point"]].values.tolist() == [["iobb_up", 1.0], ["auroc_alike", 2.0]]
    assert claimed(plan, found, "shifted_bce")["claim"].tolist() == ["shift_gives_iobb"]
    assert "metric" not in claimed(plan, found, "bce")


def test_claims_about_records_are_those_that_the_records_have():
    rng = np.random.default_rng(0)
    records = pd.concat(
        pd.DataFrame({"image": list("abcdef"), "patient": list("aabbcc"), "unique": rng.random(6)}).assign(
            task="binary", backbone="resnet50", loss=loss, seed=0
        )
        for loss in ("untrained", "bce")
    )
    found = record_claims(load_plan(), records, "untrained", ["image"], n_replicates=20)
    assert found["claim"].tolist() == ["concepts_not_untrained"] and found["loss"].tolist() == ["bce"]
    judged = judge(load_plan(), "demo", found)
    assert judged["outcome"].item() in ("holds", "contradicted", "undecided") and judged["metric"].item() == "unique"
