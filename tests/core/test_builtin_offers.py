"""What the references say of devices that they cannot run on."""

from __future__ import annotations

from grpo_core.builtin import grpo_fused_ops
from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.weigh import ALLOW_REFERENCE, refusal


def test_the_reference_sampler_is_refused_where_there_is_no_float64() -> None:
    impl = next(impl for impl in grpo_fused_ops() if impl.op == "sample.token")
    need = Need(op="sample.token", facts={"dtype": "float32", "vocab_size": 10})

    def said(*dtypes: str) -> str | None:
        device = DeviceInfo(type="acme", name="Acme One", dtypes=frozenset(dtypes))
        return refusal(Offer(plugin="core", impl=impl), [need], device, CONTRACTS[impl.op], ALLOW_REFERENCE)

    assert said("float32", "float64") is None
    assert said("float32") == "computes in float64, which Acme One lacks"
