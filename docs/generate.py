"""Write the pages that follow from the code: configuration.md, contracts.md, hooks.md and models.md.

    python docs/generate.py            write them
    python docs/generate.py --check    exit 1 when they are not up to date

Descriptions are the docstrings under the fields, so they are said once.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo_core import config, hookspecs, impl
from grpo_core.model.arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE, Rope
from grpo_core.model.layout import Layout, rank_bytes
from grpo_core.model.scale import active_parameters, total_parameters
from grpo_core.needs import RunFacts, needs_of
from grpo_core.ops.contract import CONTRACTS, Contract
from grpo_core.plugin_checks import CACHE_OF
from grpo_core.plugins import load
from grpo_core.signatures import protocol_methods

DOCS = Path(__file__).parent
PUBLISHED = DOCS.parent / "tests" / "plugins" / "models" / "published"
"""config.json of real models, as their authors published them."""
CPU = impl.DeviceInfo(type="cpu", dtypes=frozenset({"float32", "float64", "bfloat16"}))
BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
NOTE = "<!-- Written by docs/generate.py; edit the docstrings instead. -->\n"


def attribute_docs(module: Any) -> dict[str, dict[str, str]]:
    """Class name -> attribute -> the docstring below it, on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        table = found.setdefault(node.name, {})
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                table[field.target.id] = " ".join(str(after.value.value).split())
    return found


def type_text(annotation: Any) -> str:
    """A type as a person writes it in YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping to {type_text(args[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds_text(field: FieldInfo) -> str:
    """The limits of a number, e.g. ">= 0, < 1"."""
    parts = [
        f"{sign} {getattr(item, name)}"
        for name, sign in BOUNDS
        for item in field.metadata
        if getattr(item, name, None) is not None
    ]
    return ", ".join(parts)


def default_text(field: FieldInfo) -> str:
    """The default as YAML would have it, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in ("", [], {}):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str) -> str:
    """Text that is safe in a table, and whose <names> are not taken for HTML."""
    outside = "`".join(
        part if index % 2 else part.replace("<", "\\<") for index, part in enumerate(text.split("`"))
    )
    return outside.replace("|", "\\|")


def section_table(model: type[BaseModel], prefix: str, docs: dict[str, dict[str, str]]) -> list[str]:
    """The rows of one section's settings; sections within it get tables of their own."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if section_of(field.annotation) is not None:
            continue
        kind = ", ".join(part for part in (type_text(field.annotation), bounds_text(field)) if part)
        meaning = docs[model.__name__].get(name, "")
        rows.append(f"| `{prefix}{name}` | {cell(kind)} | {cell(default_text(field))} | {cell(meaning)} |")
    return rows


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model class behind `Section` or `list[Section]`, else None."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def configuration_page() -> str:
    """docs/configuration.md"""
    docs = attribute_docs(config)
    head = (DOCS / "parts" / "configuration.md").read_text()
    lines = [NOTE, head, "## Top level\n", *section_table(config.Config, "", docs)]
    for name, field in config.Config.model_fields.items():
        model = section_of(field.annotation)
        if model is None:
            continue
        many = get_origin(field.annotation) is list
        lines += [f"\n## `{name}`\n"]
        if many:
            lines += ["A list; each entry has:\n"]
        if model.__doc__ and model is not BaseModel and model.__doc__ != BaseModel.__doc__:
            lines += [" ".join(model.__doc__.split()) + "\n"]
        lines += section_table(model, f"{name}[]." if many else f"{name}.", docs)
    return "\n".join(lines) + "\n"


def signature_text(contract: Contract) -> str:
    """The call of a function op, or the public methods of a class op."""
    module, _, name = contract.protocol.partition(":")
    protocol = getattr(importlib.import_module(module), name)
    if contract.kind == "function":
        return f"{contract.op}{method_text(protocol.__call__)}"
    lines = [f"class {name}:"]
    for label, member in vars(protocol).items():
        own = inspect.isfunction(member) and member.__qualname__ == f"{name}.{label}"
        if not own or (label.startswith("_") and label not in ("__init__", "__call__")):
            continue
        text = inspect.getdoc(member) if member.__doc__ else None
        lines.append(f"    def {label}{method_text(member)}")
        lines += [f"        {line}".rstrip() for line in (text or "").splitlines()]
    return "\n".join(lines)


def method_text(function: Any) -> str:
    """A signature without `self`, annotations as written."""
    sig = inspect.signature(function)
    kept = [p for p in sig.parameters.values() if p.name != "self"]
    return str(sig.replace(parameters=kept)).replace("'", "")


def facts_by_op() -> dict[str, list[str]]:
    """The facts that a plan asks of each op, which are what `limits` may name."""
    rope = Rope(theta=10000.0, rotary_dim=64)
    heads = {"num_attention_heads": 2, "rope": rope}
    mixers = (
        Attention(num_key_value_heads=1, head_dim=64, qk_norm=True, **heads),
        MLA(
            q_lora_rank=32, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
            scale=0.1, **heads,
        ),
        GatedDelta(num_key_heads=1, num_value_heads=2, key_head_dim=64, value_head_dim=64, conv_kernel=4),
    )  # fmt: skip
    moe = MoE(num_experts=4, top_k=2, intermediate_size=64, score="softmax", norm_topk_prob=True)
    layers = [
        Layer(mixer=mixer, ffn=ffn) for mixer in mixers for ffn in (DenseMLP(intermediate_size=256), moe)
    ]
    arch = Arch(
        family="example", vocab_size=64, hidden_size=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
        layers=tuple(layers), max_position_embeddings=128,
    )  # fmt: skip
    found: dict[str, dict[str, None]] = {op: {} for op in CONTRACTS}
    for need in needs_of(arch, RunFacts(train_dtype="float32", rollout_dtype="float32")):
        found[need.op].update(dict.fromkeys(need.facts))
    for op in CACHE_OF:
        found[op]["cache"] = None
    return {op: list(names) for op, names in found.items()}


def contract_section(contract: Contract, asked: list[str]) -> list[str]:
    """One op: its hook, its call, its specification, and the facts that are asked of it."""
    module, _, name = contract.protocol.partition(":")
    protocol = getattr(importlib.import_module(module), name)
    texts = [inspect.getdoc(protocol) or ""]
    if contract.kind == "function":
        texts.append(inspect.getdoc(protocol.__call__) or "")
    facts = [f"hook `grpo_{contract.hook}`", f"version {contract.version}"]
    if contract.backward:
        facts.append("differentiable")
    if contract.covers:
        facts.append("replaces " + ", ".join(f"`{op}`" for op in contract.covers))
    facts.append(
        f"specification `{contract.reference}`" if contract.reference else "optional: a speed-up only"
    )
    facts.append("facts " + (", ".join(f"`{name}`" for name in asked) or "none"))
    body = ["```python", signature_text(contract), "```", ""]
    return [
        f"### `{contract.op}`\n",
        "; ".join(facts) + ".\n",
        *body,
        *[text + "\n" for text in texts if text],
    ]


def hooks_page() -> str:
    """docs/hooks.md"""
    lines = [
        NOTE,
        (DOCS / "parts" / "hooks.md").read_text(),
        "## The hooks\n",
        "| hook | what it is |",
        "| --- | --- |",
    ]
    for name, function in vars(hookspecs).items():
        if name.startswith("grpo_"):
            arguments = ", ".join(inspect.signature(function).parameters)
            lines.append(f"| `{name}({arguments})` | {cell(' '.join((function.__doc__ or '').split()))} |")
    lines += ["\n## The records\n"]
    docs = attribute_docs(impl)
    for model in (impl.Impl, impl.Need, impl.DeviceInfo):
        lines += [
            f"### `{model.__name__}`\n",
            (model.__doc__ or "") + "\n",
            "| field | meaning |",
            "| --- | --- |",
        ]
        lines += [
            f"| {cell(f'`{name}: {field.type}`')} | {cell(docs[model.__name__].get(name, ''))} |"
            for name, field in model.__dataclass_fields__.items()
        ]
        lines.append("")
    lines += ["## The ops\n"]
    asked = facts_by_op()
    for op, contract in CONTRACTS.items():
        lines += contract_section(contract, asked[op])
    return "\n".join(lines).rstrip() + "\n"


PARTS = {
    "attention.cache": "grpo_core.ops.attention:LayerCache", "mla.cache": "grpo_core.ops.mla:LatentLayer",
    "comm.collectives": "grpo_core.ops.collectives:Group",
}  # fmt: skip
"""Protocols of what the methods of a class give out."""


def arguments_of(contract: Contract) -> list[str]:
    """The parameters of a function op, or "<method>.<parameter>" of a class op."""
    found = []
    for pointer in filter(None, (contract.protocol, PARTS.get(contract.op))):
        module, _, name = pointer.partition(":")
        for method, function in protocol_methods(getattr(importlib.import_module(module), name)).items():
            names = [one for one in inspect.signature(function).parameters if one != "self"]
            found += names if contract.kind == "function" else [f"{method}.{one}" for one in names]
    return found


def vendor_arguments() -> dict[str, dict[str, dict[str, str]]]:
    """Vendor -> op -> argument -> what it becomes; the empty name is the call itself."""
    files = sorted(DOCS.parent.glob("plugins/*/grpo_*/arguments.json"))
    content = [json.loads(path.read_text()) for path in files]
    return {one["vendor"]: one["ops"] for one in content}


def contracts_page() -> str:
    """docs/contracts.md"""
    vendors = vendor_arguments()
    why = "Why they became what they are: [decision 0009](decisions/0009-contracts-after-two-vendors.md).\n"
    lines = [NOTE, (DOCS / "parts" / "contracts.md").read_text(), why, "## Arguments, vendor by vendor\n"]
    for op, contract in CONTRACTS.items():
        if op.startswith("engine."):
            continue
        lines += [f"### `{op}`\n", f"| argument | {' | '.join(vendors)} |"]
        lines.append("| --- " * (1 + len(vendors)) + "|")
        for name in ("", *arguments_of(contract)):
            cells = [cell(vendors[vendor].get(op, {}).get(name, "")) for vendor in vendors]
            lines.append(f"| {f'`{name}`' if name else 'call'} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def models_page() -> str:
    """docs/models.md"""
    catalogue = load()
    own = {plugin.id for plugin in catalogue.plugins if plugin.distribution == "grpo-core"}
    families = [one for one in catalogue.models.values() if catalogue.owners[f"model:{one.name}"] in own]
    served = {path.stem: json.loads(path.read_text()) for path in sorted(PUBLISHED.glob("*.json"))}
    owner = {
        name: next(one for one in families if set(one.architectures) & set(config["architectures"]))
        for name, config in served.items()
    }
    archs = {name: owner[name].arch(config) for name, config in served.items()}
    lines = [NOTE, (DOCS / "parts" / "models.md").read_text(), "## Families\n"]
    lines += ["| family | architectures | switch for thinking |", "| --- | --- | --- |"]
    for family in families:
        names = ", ".join(f"`{name}`" for name in family.architectures)
        lines.append(f"| `{family.name}` | {names} | {cell(family.chat().thinking or '-')} |")
    lines.append("\nAnother one is a package with [one file like these](write-a-model-plugin.md).")
    lines += [
        "\n## Sizes\n",
        "Counted from `config.json`, without layers for multi-token prediction. The cache is that of one",
        "more token in bfloat16, over all layers; the state is that of one sequence of any length.\n",
        "| model | family | parameters | active | cache of a token | state of a sequence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, arch in archs.items():
        _, held = rank_bytes(arch, Layout(), dtype="bfloat16")
        state = f"{held.state_sequence / 2**20:.1f} MiB" if held.state_sequence else "-"
        lines.append(
            f"| {name} | `{arch.family}` | {total_parameters(arch) / 1e9:.2f} B |"
            f" {active_parameters(arch) / 1e9:.2f} B | {held.kv_cache_token / 1024:.1f} KiB |"
            f" {state} |"
        )
    lines += ["\n## Recipes\n", (DOCS / "parts" / "models-recipes.md").read_text()]
    recipes = {name: owner[name].recipe(arch, CPU, 1) for name, arch in archs.items()}
    lines += recipe_rows(recipes)
    lines += ["", (DOCS / "parts" / "models-topics.md").read_text()]
    return "\n".join(lines).rstrip() + "\n"


def recipe_rows(recipes: dict[str, dict[str, Any]]) -> list[str]:
    """One row for each setting and advice, with the models that get it."""
    rows = ["| setting | default | for | why |", "| --- | --- | --- | --- |"]
    told: dict[tuple[str, str, str], list[str]] = {}
    for name, recipe in recipes.items():
        for key, advice in recipe.items():
            told.setdefault((key, str(advice.value), advice.why), []).append(name)
    for (key, value, why), names in sorted(told.items()):
        models = "all" if len(names) == len(recipes) else ", ".join(names)
        rows.append(f"| `{key}` | `{value}` | {models} | {cell(why)} |")
    return rows


PAGES = {
    "configuration.md": configuration_page, "contracts.md": contracts_page, "hooks.md": hooks_page,
    "models.md": models_page,
}  # fmt: skip


def stale() -> list[str]:
    """Pages whose file is not what the code says now."""
    return [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text() != page()
    ]


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        old = stale()
        for name in old:
            print(f"docs/{name} is not up to date: run `python docs/generate.py`", file=sys.stderr)
        return 1 if old else 0
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
