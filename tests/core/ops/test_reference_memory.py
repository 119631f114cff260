from __future__ import annotations

import pytest
import torch

from grpo_core.ops.reference.memory import HostMemory


def tensors() -> dict[str, torch.Tensor]:
    """Odd values of several dtypes, a view into another tensor and a parameter."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(1000, generator=generator)
    big[3], big[4] = torch.nan, -0.0
    return {
        "big": big,
        "view": big[10:20].view(2, 5),
        "bf16": torch.randn(7, 3, generator=generator).bfloat16(),
        "int": torch.arange(5),
        "parameter": torch.nn.Parameter(torch.randn(4, 4, generator=generator)),
        "empty": torch.empty(0),
        "strided": torch.randn(6, 4, generator=generator).T,
    }


def bits(x: torch.Tensor) -> list[int]:
    return x.detach().contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_content_comes_back_bit_for_bit_in_the_same_tensors(keep: str) -> None:
    memory, held = HostMemory(), tensors()
    before = {name: bits(x) for name, x in held.items()}
    memory.hold("weights", held.values())
    size = sum(x.nbytes for name, x in held.items() if name != "view")
    assert memory.stats().by_tag == {"weights": size}
    for _ in range(2):
        memory.sleep("weights", keep=keep)
        memory.sleep("weights", keep=keep)  # once more changes nothing
        assert all(x.untyped_storage().nbytes() == 0 for x in held.values())
        assert memory.stats().asleep == {"weights": keep}
        assert memory.stats().allocated == 0
        memory.wake("weights")
        memory.wake("weights")
        assert {name: bits(x) for name, x in held.items()} == before
        assert held["view"].data_ptr() == held["big"].data_ptr() + 40
    assert memory.stats().asleep == {}
    assert memory.stats().allocated == size
    (held["parameter"] * 2).sum().backward()
    assert held["parameter"].grad.tolist() == [[2.0] * 4] * 4


def test_forgotten_content_wakes_as_zeros() -> None:
    memory, x = HostMemory(), torch.ones(3, 2)
    memory.hold("cache", [x])
    memory.sleep("cache", keep="none")
    memory.wake("cache")
    assert x.tolist() == [[0.0, 0.0]] * 3


def test_tags_sleep_one_by_one_while_others_are_added() -> None:
    """The file of a sleeping tag was named by its place among all tags, which later tags moved."""
    memory, a, b = HostMemory(), torch.ones(2), torch.full((2,), 2.0)
    memory.hold("b", [b])
    memory.sleep("b", keep="disk")
    memory.hold("a", [a])
    memory.sleep("a", keep="disk")
    memory.wake("b", "a")
    assert (a.tolist(), b.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_misuse_is_refused() -> None:
    memory, x = HostMemory(), torch.ones(4)
    memory.hold("a", [x])
    with pytest.raises(ValueError, match="shares its storage"):
        memory.hold("b", [x[1:]])
    for call in (lambda: memory.sleep("unknown", keep="host"), lambda: memory.wake("unknown")):
        with pytest.raises(ValueError, match="unknown"):
            call()
    with pytest.raises(ValueError, match="keep"):
        memory.sleep("a", keep="cloud")
    memory.sleep("a", keep="host")
    with pytest.raises(ValueError, match="wake it"):
        memory.hold("a", [torch.ones(1)])


def test_pool_and_peak() -> None:
    memory = HostMemory()
    with memory.pool("scratch"):
        x = torch.ones(1 << 22)
    assert memory.stats().by_tag["scratch"] == 0
    assert memory.stats().peak >= memory.stats().reserved - (1 << 20) > x.nbytes
    memory.reset_peak()
    y = torch.ones(1 << 24)
    assert memory.stats().peak >= y.nbytes
    memory.empty_cache()
