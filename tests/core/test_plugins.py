"""The loader: every failure is recorded with its place, and the other plugins live."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_helpers import offer, offering, plugin

from grpo_core.catalogue import Catalogue
from grpo_core.errors import ConfigError, PluginError
from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl
from grpo_core.plugins import HOOKS, attempt, load


def failures(catalogue: Catalogue, name: str) -> list[str]:
    return [f"{failure.where}: {failure.error}" for failure in catalogue.failures if failure.plugin == name]


def test_the_bundled_plugins_load_without_failure() -> None:
    catalogue = load()
    assert catalogue.failures == ()
    assert sorted((item.id, item.distribution) for item in catalogue.plugins) == [
        ("ascend", "grpo-core"),
        ("conformance", "grpo-core"),
        ("core", "grpo-core"),
        ("cpu", "grpo-core"),
        ("cuda", "grpo-core"),
        ("models", "grpo-core"),
        ("sim", "grpo-core"),
    ]


def test_an_offer_keeps_its_plugin() -> None:
    catalogue = load(extra={"acme": offering(offer())})
    found = catalogue.offer("attention.varlen", "acme:fast")
    assert found is not None and found.plugin == "acme" and found.impl == offer()
    assert any(item.id == "acme" and item.hooks == ("grpo_attention",) for item in catalogue.plugins)


def raising() -> list[Impl]:
    raise RuntimeError("no driver")


def leaving() -> list[Impl]:
    sys.exit("bye")


def yielding_then_raising() -> Iterator[Impl]:
    yield offer()
    raise OSError("library lost")


BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (plugin(attention=raising), "grpo_attention: RuntimeError: no driver"),
    "exits": (plugin(attention=leaving), "grpo_attention: SystemExit: bye"),
    "half": (plugin(attention=yielding_then_raising), "grpo_attention: OSError: library lost"),
    "none": (plugin(attention=lambda: None), "grpo_attention: TypeError: 'NoneType' object is not iterable"),
    "not_impl": (plugin(attention=lambda: [{"op": "x"}]), "answered with {'op': 'x'}, which is not an Impl"),
    "unknown_op": (
        plugin(attention=lambda: [offer("attention.varlan")]),
        "offers the unknown op 'attention.varlan' (did you mean 'attention.varlen'?)",
    ),
    "wrong_hook": (
        plugin(attention=lambda: [offer("norm.rms")]),
        "grpo_attention: offers norm.rms under grpo_attention; it belongs under grpo_fused_ops",
    ),
    "twice": (
        plugin(attention=lambda: [offer(), offer(rank=99)]),
        "offers attention.varlen twice as twice:fast; the first is used",
    ),
    "limit_text": (offering(offer(limits={"dtype": "bfloat16"})), "limits['dtype'] must be a set"),
    "limit_number": (offering(offer(limits={"head_dim": 64})), "limits['head_dim'] must be a set"),
    "limit_list": (offering(offer(limits=[("dtype", {"bfloat16"})])), "limits must be a mapping"),
    "no_cache": (offering(offer("attention.decode")), "limits['cache'] must name the ids of the caches"),
    "requires": (offering(offer(requires=("flash attn >= 2",))), "is not a PEP 508 requirement"),
    "comma": (offering(offer(requires="torch>=2")), "requires must be a tuple of strings"),
    "pointer": (offering(offer(load="acme.ops.call")), "load must be 'package.module:attribute'"),
    "colon": (offering(offer(name="a:b")), "its name must be a word without ':'"),
    "rank": (offering(offer(rank="high")), "rank must be an int"),
    "when": (offering(offer(when="never")), "when must be callable or None"),
    "argument": (plugin(attention=lambda device: []), "register: PluginValidationError"),
    "unknown_hook": (plugin(atention=raising), "unknown hook (did you mean 'grpo_attention'?)"),
    "no_hook": (SimpleNamespace(attention=1), "register: it implements no hook"),
    "device": (plugin(devices=lambda: [object()]), "a device without name"),
    "model": (plugin(models=lambda: [object()]), "a model family without name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_a_failure_and_the_others_live(name: str) -> None:
    broken, expected = BROKEN[name]
    catalogue = load(extra={name: broken, "zz_good": offering(offer())})
    assert any(expected in text for text in failures(catalogue, name)), failures(catalogue, name)
    assert all(failure.plugin == name and failure.fix for failure in catalogue.failures)
    assert catalogue.offer("attention.varlen", "zz_good:fast") is not None
    if name != "twice":
        assert not [item.id for listed in catalogue.offers.values() for item in listed if item.plugin == name]


def test_one_bad_answer_does_not_take_the_good_ones_along() -> None:
    catalogue = load(extra={"acme": plugin(attention=lambda: [offer("no.op"), offer()])})
    assert catalogue.offer("attention.varlen", "acme:fast") is not None
    assert len(failures(catalogue, "acme")) == 1


def test_a_wrapper_is_refused_because_it_would_never_be_called() -> None:
    def grpo_attention() -> Iterator[None]:
        yield

    broken = SimpleNamespace(grpo_attention=hookimpl(wrapper=True)(grpo_attention))
    assert "a wrapper is never called" in failures(load(extra={"acme": broken}), "acme")[0]


def test_a_function_without_the_marker_is_not_passed_over_in_silence() -> None:
    module = ModuleType("acme_plugin")
    exec("def grpo_attention(): return []\ndef grpo_fused_opps(): return []", vars(module))
    found = failures(load(extra={"acme": module}), "acme")
    assert "grpo_attention: it is not marked with @hookimpl" in found
    assert any("no such hook exists (did you mean 'grpo_fused_ops'?)" in text for text in found)


def test_a_failure_keeps_the_traceback() -> None:
    failure = load(extra={"acme": plugin(attention=raising)}).failures[0]
    assert "in raising" in failure.trace and "no driver" in failure.trace


def test_attempt_lets_an_interrupt_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted)


def test_a_plugin_that_fails_while_registering_leaves_nothing_behind() -> None:
    def half(registry: Any) -> None:
        registry.reward("half", len)
        raise ValueError("then this")

    catalogue = load(extra={"acme": plugin(register=half)})
    assert "half" not in catalogue.registry.tables["reward"]
    assert failures(catalogue, "acme") == ["grpo_register: ValueError: then this"]


def test_a_name_that_is_taken_in_the_registry_stays_with_the_first() -> None:
    catalogue = load(extra={"acme": plugin(register=lambda registry: registry.reward("exact", len))})
    assert catalogue.registry.tables["reward"]["exact"][0] == "core"
    assert "reward 'exact' is registered by 'core'" in failures(catalogue, "acme")[0]


def test_a_plugin_cannot_take_a_command_of_the_core() -> None:
    def commands(cli: Any) -> None:
        cli.command("train", "mine", lambda parser: None, lambda args: 0)
        cli.command("tune", "mine too", lambda parser: None, lambda args: 0)

    catalogue = load(extra={"acme": plugin(commands=commands)})
    assert (
        sorted(catalogue.commands) == ["bench", "compare", "conformance", "tune"]
        and catalogue.owners["command:tune"] == "acme"
    )
    assert "command 'train' belongs to 'core'" in failures(catalogue, "acme")[0]


def test_two_families_for_one_architecture_are_a_failure_of_the_second() -> None:
    def family(name: str) -> SimpleNamespace:
        functions = dict.fromkeys(("arch", "weights", "chat", "recipe"), len)
        return SimpleNamespace(name=name, architectures=("AcmeForCausalLM",), **functions)

    catalogue = load(
        extra={"b": plugin(models=lambda: [family("two")]), "a": plugin(models=lambda: [family("one")])}
    )
    assert catalogue.model_plugin_for(["AcmeForCausalLM"]).name == "one"
    assert "claims AcmeForCausalLM, which 'a' serves already" in failures(catalogue, "b")[0]


def test_an_unserved_family_names_the_served_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        load().model_plugin_for(["Qwen2ForCasualLM"])
    assert "did you mean 'Qwen2ForCausalLM'" in raised.value.why


def test_plugins_off_leaves_a_plugin_out() -> None:
    catalogue = load(off=["acme"], extra={"acme": offering(offer())})
    assert catalogue.offer("attention.varlen", "acme:fast") is None and catalogue.off == ("acme",)


@pytest.mark.parametrize(("name", "expected"), [("core", "names the core"), ("acne", "did you mean 'acme'?")])
def test_plugins_off_with_a_wrong_name_is_an_error(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        load(off=[name], extra={"acme": offering(offer())})


def test_the_registry_is_closed_after_loading() -> None:
    with pytest.raises(PluginError, match="too late"):
        load().registry.reward("late", len)


def test_a_pointer_in_the_registry_is_imported_when_asked_for() -> None:
    def register(registry: Any) -> None:
        registry.loss("root", "math:sqrt")
        registry.loss("gone", "math:no_such_function")

    registry = load(extra={"acme": plugin(register=register)}).registry
    assert registry.get("loss", "root")(9.0) == 3.0
    with pytest.raises(PluginError, match="cannot be imported from math:no_such_function"):
        registry.get("loss", "gone")


def test_every_named_thing_of_the_core_can_be_imported() -> None:
    registry = load().registry
    for kind, table in registry.tables.items():
        for name in table:
            assert callable(registry.get(kind, name)), (kind, name)


def test_the_hooks_are_the_twelve_of_the_design() -> None:
    assert len(HOOKS) == 12


@settings(max_examples=20, deadline=None)
@given(st.permutations(["a", "b", "c", "d"]))
def test_the_catalogue_does_not_depend_on_the_order_of_plugins(order: list[str]) -> None:
    same_family = {name: offering(offer(name="x"), offer("norm.rms", "x")) for name in "abcd"}
    catalogue = load(extra={name: same_family[name] for name in order})
    assert [item.id for item in catalogue.offers["attention.varlen"] if item.impl.name == "x"] == [
        "a:x", "b:x", "c:x", "d:x",
    ]  # fmt: skip
    assert [item.id for item in catalogue.plugins][-4:] == ["a", "b", "c", "d"]
