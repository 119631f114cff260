"""Names that a new plugin can have, and what its files are called after them."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from importlib import metadata

from ..catalogue import Catalogue
from ..devices.pick import AUTO
from ..errors import ConfigError

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
ARCHITECTURE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_NAME = 24
"""With more, lines of the package would be too long for its own linter."""
OWN = ("core", "conformance")
"""grpo_<name> is a package of this distribution; those of bundled plugins are found as plugins."""
WORDS = (AUTO, "true", "false", "null", "model", "audit", "verify", "diff")
"""What YAML, `device:` or `grpo conformance` take for something else than a device's name."""


def fields_of(name: str, architecture: str | None = None) -> dict[str, str]:
    """What the templates are filled with. Raises `ConfigError` for a name that cannot be used."""
    _check_name(name)
    words = re.split("[-_]", name)
    cls = "".join(word[0].upper() + word[1:] for word in words)
    module = "_".join(words)
    # A module that is called like a keyword or like its neighbour plugin.py could not be imported.
    module += "_family" if keyword.iskeyword(module) or module == "plugin" else ""
    architecture = architecture or f"{cls}ForCausalLM"
    if not ARCHITECTURE.fullmatch(architecture):
        raise ConfigError(
            f"{architecture!r} cannot be an architecture",
            why="config.json names a class there, such as LlamaForCausalLM",
            fix="copy the entry of `architectures` in the model's config.json",
        )
    return {
        "name": name,
        "plugin": name,
        "module": module,
        "cls": f"{cls}Family" if keyword.iskeyword(cls) else cls,
        "architecture": architecture,
        "words": "_".join(words),
        "package": f"grpo_{'_'.join(words)}",
        "distribution": f"grpo-{'-'.join(words)}",
        "core_version": metadata.version("grpo-core"),
    }


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:MAX_NAME].strip("-")
        raise ConfigError(
            f"{name!r} cannot be a plugin's name",
            why=f"a name has lower-case letters, digits and single hyphens or underscores, starts with a "
            f"letter and has at most {MAX_NAME} characters; packages and modules are called after it",
            fix=f"take {near!r}" if near else "take a name such as my-llm",
        )
    if name in OWN:
        raise ConfigError(
            f"{name!r} cannot be a plugin's name",
            why=f"the package grpo_{name} belongs to grpo-core itself",
            fix="take another name",
        )


def check_plugin(fields: Mapping[str, str], catalogue: Catalogue) -> None:
    """Two plugins of one name would leave the new one unused. Raises `ConfigError`."""
    for plugin in catalogue.plugins:
        if plugin.id == fields["plugin"]:
            raise ConfigError(
                f"a plugin {plugin.id!r} is installed already",
                why=f"it comes from {plugin.distribution} {plugin.version}, and names are unique",
                fix=f"take another name, or uninstall {plugin.distribution}",
            )


def check_family(fields: Mapping[str, str], catalogue: Catalogue) -> None:
    """So would two for one architecture. Raises `ConfigError`."""
    for family in catalogue.models.values():
        if fields["architecture"] in family.architectures or family.name == fields["name"]:
            owner = catalogue.owners[f"model:{family.name}"]
            raise ConfigError(
                f"{fields['architecture']} is served already",
                why=f"by family {family.name!r} of plugin {owner!r}; of two the first is used",
                fix="take another name, or give the one of your config.json with --architecture",
            )


def check_device(name: str, catalogue: Catalogue) -> None:
    """`device: NAME` must mean the new device and nothing else. Raises `ConfigError`."""
    if name in WORDS:
        raise ConfigError(
            f"{name!r} cannot be a device's name",
            why="YAML, the config or `grpo conformance` takes it for something else",
            fix=f"take a name such as {name}-chip",
        )
    for device in catalogue.devices.values():
        if name in (device.name, device.type):
            owner = catalogue.owners[f"device:{device.name}"]
            raise ConfigError(
                f"{name!r} is a device already",
                why=f"plugin {owner!r} brings device {device.name!r} of torch type {device.type!r}",
                fix=f"take another name, such as {name}-2",
            )
    if _is_torch_type(name):
        raise ConfigError(
            f"{name!r} is a device type of torch itself",
            why="the config would choose what is called so, and the new device starts as another type",
            fix=f"take the product's name, or {name}-chip; its torch type is said in device.py",
        )


def _is_torch_type(name: str) -> bool:
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
