"""Plans for a device that is not here, and the level of proof that offers state."""

from __future__ import annotations

import pytest
from plan_helpers import ACME, VARLEN, catalogue_of, offer, offering

from grpo_core.errors import PlanError
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugin_checks import impl_problem
from grpo_core.plugins import load
from grpo_core.resolve import resolve

NEEDS = ("acme-driver>=2", "acme-kernels")
CATALOGUE = {"acme": [offer(device="acme", requires=NEEDS)], "other": [offer(device="acme", rank=20)]}


def test_requirements_count_as_installed_and_a_note_tells_which_are_not() -> None:
    catalogue = catalogue_of(CATALOGUE)
    assert resolve([VARLEN], catalogue, ACME).choice("attention.varlen").chosen == "other:fast"
    plan = resolve([VARLEN], catalogue, ACME, on_paper=True)
    assert plan.choice("attention.varlen").chosen == "acme:fast"
    assert plan.notes == (
        "on paper: needs acme-driver>=2, not installed",
        "on paper: needs acme-kernels, not installed",
    )


def test_what_an_offer_cannot_do_it_cannot_do_on_paper_either() -> None:
    limited = offer(device="acme", requires=NEEDS, limits={"head_dim": {128}})
    with pytest.raises(PlanError, match="nothing serves") as error:
        resolve([VARLEN], catalogue_of({"acme": [limited]}), ACME, on_paper=True)
    assert "head_dim=64 not in {128}" in error.value.why


def test_only_requirements_of_chosen_offers_are_noted() -> None:
    offers = {"acme": [offer(device="acme")], "other": [offer(device="acme", rank=20, requires=NEEDS)]}
    assert resolve([VARLEN], catalogue_of(offers), ACME, on_paper=True).notes == ()


def test_a_level_of_proof_has_a_name() -> None:
    for proof in ("", "audited", "simulated", "hardware"):
        assert impl_problem(offer(proof=proof), "attention", CONTRACTS) is None
    assert "proof must be one of" in str(impl_problem(offer(proof="sure"), "attention", CONTRACTS))
    (failure,) = load(extra={"acme": offering(offer(proof="sure"))}).failures
    assert "'sure'" in failure.error
