"""Resolution: which offer wins, and every way of being refused, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_helpers import ACME, CPU, VARLEN, catalogue_of, offer

from grpo_core import builtin
from grpo_core.catalogue import Failure
from grpo_core.errors import PlanError
from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Choice
from grpo_core.plugin_checks import CACHES, impl_problem
from grpo_core.resolve import resolve

FLOOR = offer(name="floor", device="*", rank=1)
FACTS = {"dtype": "bfloat16", "head_dim": 64}


def choose(*impls: Impl, need: Need = VARLEN, device: DeviceInfo = CPU, **settings: Any) -> Choice:
    """The row for one need with these offers of the plugin "p" and a floor that always fits."""
    catalogue = catalogue_of({"p": impls, "q": [replace(FLOOR, op=need.op)]})
    return resolve([need], catalogue, device, **settings).choice(need.op)


def refused(impl: Impl, **others: Any) -> str:
    """Why the plan passed over this offer although it has the higher rank."""
    row = choose(impl, **others)
    assert row.chosen == "q:floor"
    [passed] = [item for item in row.passed if item.id.startswith("p:")]
    assert not passed.fits
    return passed.reason


def test_the_highest_rank_wins_and_the_others_are_kept() -> None:
    row = choose(offer(name="a", rank=50), offer(name="b", rank=80))
    assert (row.chosen, row.rank, row.load) == ("p:b", 80, "acme.ops:call")
    assert row.reason == "rank 80, 2 others fit"
    assert [(item.id, item.reason, item.fits) for item in row.passed] == [
        ("p:a", "fits, rank 50 below 80", True),
        ("q:floor", "fits, rank 1 below 80", True),
    ]


def test_equal_ranks_are_settled_by_id() -> None:
    row = choose(offer(name="b"), offer(name="a"))
    assert row.chosen == "p:a"
    assert row.passed[0].reason == "fits, rank 50 as p:a, which comes first by id"


def test_an_offer_for_another_device_is_refused() -> None:
    assert refused(offer(device="acme")) == "for acme, not cpu"


def test_a_star_serves_any_device() -> None:
    assert choose(offer(device="*"), device=ACME).chosen == "p:fast"


LIMITS: list[tuple[Mapping[str, Any], str]] = [
    ({"dtype": {"float32", "float16"}}, "dtype=bfloat16 not in {float16, float32}"),
    ({"head_dim": range(8, 64, 8)}, "head_dim=64 not in range(8, 64, 8)"),
    ({"window": {True}}, "window=False not in {True}"),
    ({"head_dim": {128, 32, 256}}, "head_dim=64 not in {32, 128, 256}"),
    (
        {"headdim": {64}},
        "limits 'headdim', which no need of attention.varlen states (did you mean 'head_dim'?)",
    ),
]


@pytest.mark.parametrize(("limits", "reason"), LIMITS)
def test_limits_must_contain_the_need(limits: Mapping[str, Any], reason: str) -> None:
    assert refused(offer(limits=limits)) == reason


def test_limits_that_contain_the_need_let_the_offer_through() -> None:
    limits = {"dtype": frozenset({"bfloat16"}), "head_dim": range(8, 257, 8), "window": {False}}
    assert choose(offer(limits=limits)).chosen == "p:fast"


class Raising:
    def __contains__(self, value: object) -> bool:
        raise ZeroDivisionError("odd limit")


def test_a_limit_that_raises_refuses_its_offer_only() -> None:
    reason = refused(offer(limits={"dtype": Raising()}))
    assert reason == "limits['dtype'] raised on 'bfloat16': ZeroDivisionError: odd limit"


@pytest.mark.parametrize("flag", ["backward", "graph", "deterministic", "batch_invariant"])
def test_a_flag_that_is_needed_must_be_offered(flag: str) -> None:
    need = replace(VARLEN, **{"backward": False, flag: True})
    catalogue = catalogue_of({"p": [offer(backward=False)], "q": [replace(FLOOR, **{flag: True})]})
    row = resolve([need], catalogue, CPU).choice("attention.varlen")
    assert row.chosen == "q:floor" and row.passed[0].reason == f"does not offer {flag}"


def test_requirements_are_held_against_installed_metadata() -> None:
    assert (
        refused(offer(requires=("acme-runtime-absent>=2",))) == "needs acme-runtime-absent>=2, not installed"
    )
    assert refused(offer(requires=("pluggy>=99",))).startswith("needs pluggy>=99, 1.")
    assert choose(offer(requires=("pluggy>=1.5",))).chosen == "p:fast"


def test_when_has_the_last_word_and_sees_device_and_need() -> None:
    def when(info: DeviceInfo, need: Need) -> str | None:
        return f"not on {info.name} with head_dim {need.facts['head_dim']}"

    assert refused(offer(when=when)) == "not on test processor with head_dim 64"
    assert choose(offer(when=lambda info, need: None)).chosen == "p:fast"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (False, "its `when` returned False; it must return a reason or None"),
        ("", "its `when` returned ''; it must return a reason or None"),
    ],
)
def test_a_when_that_answers_wrongly_refuses(said: object, reason: str) -> None:
    assert refused(offer(when=lambda info, need: said)) == reason


def test_a_when_that_raises_refuses_its_offer_only() -> None:
    assert refused(offer(when=lambda info, need: need.facts["page"])) == "its `when` raised KeyError: 'page'"


def test_contract_versions() -> None:
    contracts = {"attention.varlen": replace(CONTRACTS["attention.varlen"], version=3, oldest=2)}
    floor = catalogue_of({"q": [replace(FLOOR, contract=3)]})
    for version, reason in (
        (1, "written for contract 1, the oldest served is 2: update the plugin"),
        (4, "written for contract 4, this core has 3: update grpo-core"),
    ):
        catalogue = catalogue_of({"p": [offer(contract=version)], "q": [replace(FLOOR, contract=3)]})
        row = resolve([VARLEN], catalogue, CPU, contracts=contracts).choice("attention.varlen")
        assert row.passed[0].reason == reason
    assert resolve([VARLEN], floor, CPU, contracts=contracts).choice("attention.varlen").contract == 3


def test_an_older_offer_serves_an_added_argument_at_its_neutral_value_only() -> None:
    contract = replace(CONTRACTS["attention.varlen"], version=1, added={"softcap": (1, None)})
    catalogue = catalogue_of({"p": [offer(contract=0, rank=60)], "q": [replace(FLOOR, contract=1)]})
    for facts, chosen in (({}, "p:fast"), ({"softcap": None}, "p:fast"), ({"softcap": 30.0}, "q:floor")):
        need = replace(VARLEN, facts={**VARLEN.facts, **facts})
        row = resolve([need], catalogue, CPU, contracts={"attention.varlen": contract}).choice(need.op)
        assert row.chosen == chosen
    assert row.passed[0].reason == "written for contract 0, without softcap; softcap=30.0 is asked"


def test_an_offer_must_fit_every_need_of_its_op() -> None:
    both = [VARLEN, replace(VARLEN, facts={**VARLEN.facts, "window": True})]
    catalogue = catalogue_of({"p": [offer(limits={"window": {False}})], "q": [FLOOR]})
    row = resolve(both, catalogue, CPU).choice("attention.varlen")
    assert row.chosen == "q:floor" and len(row.facts) == 2


def test_a_pin_wins_over_rank() -> None:
    row = choose(offer(rank=99), pins={"attention.varlen": "q:floor"})
    assert (row.chosen, row.pinned, row.reason) == ("q:floor", True, "pinned")
    assert row.passed[0].reason == "fits, rank 99; q:floor is pinned"


def test_a_pin_that_does_not_survive_stops_with_reason_and_alternatives() -> None:
    with pytest.raises(PlanError) as raised:
        choose(offer(limits={"head_dim": {32}}), pins={"attention.varlen": "p:fast"})
    assert raised.value.what == "ops.attention.varlen is pinned to p:fast, which cannot serve it"
    assert raised.value.why == "head_dim=64 not in {32}"
    assert raised.value.fix.endswith("q:floor")


def test_a_pin_to_an_unknown_offer_suggests_the_near_one_and_names_broken_plugins() -> None:
    catalogue = replace(
        catalogue_of({"p": [offer()]}),
        failures=(Failure(plugin="x", distribution="x 1", where="import", error="boom", fix="-"),),
    )
    with pytest.raises(PlanError) as raised:
        resolve([VARLEN], catalogue, CPU, pins={"attention.varlen": "p:fats"})
    assert "did you mean 'p:fast'" in raised.value.why and "boom" in raised.value.why


def test_a_pin_of_an_unknown_op_is_an_error_and_of_an_unneeded_one_a_note() -> None:
    with pytest.raises(PlanError, match=r"did you mean 'attention\.varlen'"):
        choose(offer(), pins={"attention.varlan": "p:fast"})
    plan = resolve([VARLEN], catalogue_of({"p": [offer()]}), CPU, pins={"norm.rms": "p:fast"})
    assert plan.notes == ("pin ops.norm.rms: p:fast is not used, this model and config do not need the op",)


def test_a_required_op_cannot_be_pinned_to_none() -> None:
    with pytest.raises(PlanError, match="pinned to none"):
        choose(offer(), pins={"attention.varlen": "none"})


def test_the_reference_serves_the_cpu_without_being_asked() -> None:
    row = resolve([VARLEN], catalogue_of({"core": [replace(FLOOR, rank=0)]}), CPU).choice("attention.varlen")
    assert row.chosen == "core:floor" and not row.fallback


def test_the_reference_on_another_device_needs_the_line_that_the_error_prints() -> None:
    catalogue = catalogue_of({"core": [replace(FLOOR, rank=0)]})
    with pytest.raises(PlanError) as raised:
        resolve([VARLEN], catalogue, ACME)
    assert raised.value.what == "nothing serves attention.varlen on acme"
    assert "core:floor: the reference serves acme only with fallback: reference" in raised.value.why
    assert "`fallback: reference`" in raised.value.fix and "core:floor" in raised.value.fix
    row = resolve([VARLEN], catalogue, ACME, fallback="reference").choice("attention.varlen")
    assert row.fallback and "FALLBACK" in row.reason


def test_fallback_does_not_push_a_better_offer_away() -> None:
    catalogue = catalogue_of({"core": [replace(FLOOR, rank=0)], "acme": [offer(device="acme")]})
    row = resolve([VARLEN], catalogue, ACME, fallback="reference").choice("attention.varlen")
    assert row.chosen == "acme:fast" and not row.fallback


def test_nothing_on_offer_says_so() -> None:
    with pytest.raises(PlanError) as raised:
        resolve([VARLEN], catalogue_of({}), CPU)
    assert raised.value.why == "no plugin offers it" and "head_dim=64" in raised.value.fix


def test_an_optional_op_may_stay_unserved() -> None:
    step = Need(op="attention.step", facts=FACTS, required=False)
    row = resolve([step], catalogue_of({}), CPU).choice("attention.step")
    assert row.chosen is None and row.reason == "optional, nothing serves it"


CACHED = [Need(op=f"attention.{name}", facts=FACTS) for name in ("cache", "prefill", "decode")]
STEP = Need(op="attention.step", facts=FACTS, required=False)


def readers(name: str, *ops: str, rank: int = 80, **fields: Any) -> list[Impl]:
    """A cache and offers that read it, all called `name`."""
    limits = {"cache": {f"p:{name}"}}
    return [offer("attention.cache", name, rank=rank, **fields)] + [
        offer(f"attention.{op}", name, rank=rank, limits=limits) for op in ops
    ]


def test_the_readers_follow_the_cache() -> None:
    impls = readers("slow", "prefill", "decode", rank=10) + readers("fast", "prefill", "decode", "step")
    plan = resolve([*CACHED, STEP], catalogue_of({"p": impls}), CPU)
    assert {row.chosen for row in plan.choices} == {"p:fast"}
    decode = plan.choice("attention.decode")
    assert decode.passed[0].reason == "cache=p:fast not in {p:slow}"


def test_a_cache_that_no_reader_can_use_is_passed_over() -> None:
    impls = readers("fast", "prefill") + readers("slow", "prefill", "decode", rank=10)
    plan = resolve([*CACHED, STEP], catalogue_of({"p": impls}), CPU)
    assert plan.choice("attention.cache").chosen == "p:slow"
    assert (
        plan.choice("attention.cache").passed[0].reason == "no offer of attention.decode fits with this cache"
    )
    assert plan.choice("attention.step").chosen is None


def test_a_pinned_reader_brings_its_cache_along() -> None:
    impls = readers("slow", "prefill", "decode", rank=10) + readers("fast", "prefill", "decode", "step")
    plan = resolve([*CACHED, STEP], catalogue_of({"p": impls}), CPU, pins={"attention.decode": "p:slow"})
    assert plan.choice("attention.cache").chosen == "p:slow"
    assert plan.choice("attention.prefill").chosen == "p:slow"


def test_pins_of_cache_and_reader_that_disagree_stop_the_plan() -> None:
    impls = readers("slow", "prefill", "decode", rank=10) + readers("fast", "prefill", "decode")
    pins = {"attention.decode": "p:slow", "attention.cache": "p:fast"}
    with pytest.raises(PlanError, match=r"ops\.attention\.decode is pinned to p:slow"):
        resolve(CACHED, catalogue_of({"p": impls}), CPU, pins=pins)


def test_no_cache_with_readers_is_told_by_the_cache() -> None:
    with pytest.raises(PlanError, match=r"nothing serves attention\.cache") as raised:
        resolve(CACHED, catalogue_of({"p": readers("fast", "prefill")}), CPU)
    assert "no offer of attention.decode fits with this cache" in raised.value.why


LATENT = [Need(op=f"mla.{name}", facts=FACTS) for name in ("cache", "prefill", "decode")]


def latent_readers(name: str, *ops: str, rank: int = 80) -> list[Impl]:
    limits = {"cache": {f"p:{name}"}}
    return [offer("mla.cache", name, rank=rank)] + [
        offer(f"mla.{op}", name, rank=rank, limits=limits) for op in ops
    ]


def test_each_cache_has_readers_of_its_own() -> None:
    impls = readers("keys", "prefill", "decode") + readers("other", "prefill", "decode", rank=10)
    impls += latent_readers("latent", "prefill", "decode") + latent_readers("whole", "prefill", rank=90)
    plan = resolve([*LATENT, *CACHED], catalogue_of({"p": impls}), CPU)
    assert {row.op: row.chosen for row in plan.choices} == {
        **{need.op: "p:keys" for need in CACHED},
        **{need.op: "p:latent" for need in LATENT},
    }
    assert plan.choice("mla.cache").passed[0].reason == "no offer of mla.decode fits with this cache"
    assert plan.choice("mla.prefill").passed[0].reason == "cache=p:latent not in {p:whole}"


def test_a_pinned_latent_reader_moves_its_cache_alone() -> None:
    impls = readers("fast", "prefill", "decode") + readers("slow", "prefill", "decode", rank=10)
    impls += latent_readers("fast", "prefill", "decode") + latent_readers(
        "slow", "prefill", "decode", rank=10
    )
    plan = resolve([*CACHED, *LATENT], catalogue_of({"p": impls}), CPU, pins={"mla.decode": "p:slow"})
    assert {plan.choice(need.op).chosen for need in LATENT} == {"p:slow"}
    assert {plan.choice(need.op).chosen for need in CACHED} == {"p:fast"}


def test_a_missing_latent_reader_is_told_by_the_latent_cache() -> None:
    impls = [*readers("keys", "prefill", "decode"), *latent_readers("latent", "prefill")]
    with pytest.raises(PlanError, match=r"nothing serves mla\.cache") as raised:
        resolve([*CACHED, *LATENT], catalogue_of({"p": impls}), CPU)
    assert "no offer of mla.decode fits with this cache" in raised.value.why


def test_every_reader_of_a_cache_must_name_the_caches_it_can_read() -> None:
    for op in ("attention.step", "mla.prefill", "mla.decode"):
        problem = impl_problem(offer(op, "p"), "attention", CONTRACTS)
        assert problem is not None and "limits['cache']" in problem


@pytest.mark.parametrize("cache", CACHES)
def test_the_references_read_the_reference_cache(cache: str) -> None:
    needs = [Need(op=op, required=op != "attention.step") for op in (cache, *CACHES[cache])]
    references = {"core": list(builtin.grpo_attention())}
    plan = resolve(needs, catalogue_of(references), CPU, fallback="reference")
    assert {row.chosen for row in plan.choices} <= {"core:reference", None}
    for op in set(CACHES[cache]) - {"attention.step"}:
        assert builtin.REFERENCE_LIMITS[op] == {"cache": {"core:reference"}}
        assert plan.choice(op).chosen == "core:reference"


def test_a_covering_op_covers_when_it_is_chosen() -> None:
    plan = resolve([*CACHED, STEP], catalogue_of({"p": readers("fast", "prefill", "decode", "step")}), CPU)
    assert plan.choice("attention.decode").covered_by == "attention.step"
    assert plan.choice("attention.decode").chosen == "p:fast"
    assert plan.choice("attention.decode").reason.startswith("covered by attention.step")


def test_a_covered_op_need_not_be_served_by_itself() -> None:
    needs = [need for need in CACHED if need.op != "attention.cache"] + [STEP]
    impls = [offer("attention.step", "fast", limits={"head_dim": {64}}), offer("attention.prefill", "fast")]
    row = resolve(needs, catalogue_of({"p": impls}), CPU).choice("attention.decode")
    assert row.chosen is None and row.covered_by == "attention.step"


def test_a_pin_of_a_covered_op_keeps_the_covering_one_out() -> None:
    impls = readers("fast", "prefill", "decode", "step")
    plan = resolve([*CACHED, STEP], catalogue_of({"p": impls}), CPU, pins={"attention.decode": "p:fast"})
    step = plan.choice("attention.step")
    assert step.chosen is None
    assert step.passed[0].reason == "attention.decode, which it covers, is pinned to p:fast"
    assert plan.choice("attention.decode").covered_by is None


def test_an_optional_op_can_be_pinned_to_none() -> None:
    impls = readers("fast", "prefill", "decode", "step")
    plan = resolve([*CACHED, STEP], catalogue_of({"p": impls}), CPU, pins={"attention.step": "none"})
    step = plan.choice("attention.step")
    assert (step.chosen, step.reason, step.pinned) == (None, "pinned to none", True)
    assert plan.choice("attention.decode").covered_by is None


OFFERS = [offer(name=name, rank=rank) for name, rank in (("a", 50), ("b", 80), ("c", 80), ("d", 20))]


@settings(max_examples=40, deadline=None)
@given(st.permutations(OFFERS), st.permutations([VARLEN, *CACHED]), st.randoms())
def test_the_plan_does_not_depend_on_any_order(impls: list[Impl], needs: list[Need], random: Any) -> None:
    listed = [*impls, *readers("x", "prefill", "decode")]
    random.shuffle(listed)
    plan = resolve(needs, catalogue_of({"p": listed}), CPU)
    assert plan == resolve(
        [VARLEN, *CACHED], catalogue_of({"p": [*OFFERS, *readers("x", "prefill", "decode")]}), CPU
    )
    assert plan.choice("attention.varlen").chosen == "p:b"
