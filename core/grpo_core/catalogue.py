"""What the plugins offer, as data: nothing behind a pointer has been imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError
from .impl import Impl
from .plugin_checks import did_you_mean

if TYPE_CHECKING:
    from .devices.base import Device
    from .model.plugin import ModelPlugin
    from .registry import Command, Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Something of a plugin that could not be used, and what to do about it."""

    plugin: str
    distribution: str
    """Name and version, "acme 1.0"."""
    where: str
    """"import", "name", "register" or the hook."""
    error: str
    fix: str
    trace: str = ""

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.distribution}), {self.where}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """A plugin that was loaded."""

    id: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An `Impl` with the plugin that made it."""

    plugin: str
    impl: Impl

    @property
    def id(self) -> str:
        """ "<plugin>:<name>", unique for an op."""
        return f"{self.plugin}:{self.impl.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """All that the loaded plugins offer."""

    plugins: tuple[PluginInfo, ...]
    offers: Mapping[str, tuple[Offer, ...]]
    """By op; the offers of one op in the order of their ids."""
    devices: Mapping[str, Device]
    """By name, the key of `device:` in the config."""
    models: Mapping[str, ModelPlugin]
    """By name of the family."""
    registry: Registry
    commands: Mapping[str, Command]
    owners: Mapping[str, str]
    """Plugin of each "device:<name>", "model:<name>" and "command:<name>"."""
    failures: tuple[Failure, ...]
    off: tuple[str, ...] = ()
    """Plugins that the config switched off."""

    def offer(self, op: str, offer_id: str) -> Offer | None:
        """The offer for `op` with this id."""
        return next((offer for offer in self.offers.get(op, ()) if offer.id == offer_id), None)

    def model_plugin_for(self, architectures: Sequence[str]) -> ModelPlugin:
        """The family that claims one of the `architectures` of a config.json. Raises `ConfigError`."""
        for architecture in architectures:
            for model in self.models.values():
                if architecture in model.architectures:
                    return model
        served = sorted(name for model in self.models.values() for name in model.architectures)
        asked = ", ".join(architectures) or "a model whose config.json names no architectures"
        broken = "".join(
            f"; {failure}" for failure in self.failures if failure.where in ("import", "grpo_models")
        )
        raise ConfigError(
            f"no model plugin serves {asked}",
            why=f"served: {', '.join(served) or 'nothing'}{did_you_mean(asked, served)}{broken}",
            fix="use a model of a served family, or install a plugin whose grpo_models claims this one",
        )
