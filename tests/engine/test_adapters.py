"""Adapters on their way to a device: the host's tier, one buffer, slots in the tables."""

from __future__ import annotations

import pytest
import torch

from gossamer.base.patch_map import PatchMap
from gossamer.engine.adapters import AdapterPacker, DeviceFrames, HostTier, Packed
from gossamer.engine.binding import DeviceBinding
from gossamer.engine.errors import DeviceFull
from gossamer.engine.frames import Move, Run
from gossamer.engine.messages import Sampling
from gossamer.engine.residency import Resident
from gossamer.kernels import records, to_dense
from gossamer.store.delta import DeltaSet
from tests.engine.running import ask, running, tokens_of
from tests.engine.six_adapters import (
    ADAPTERS,
    MIXES,
    MODEL,
    NAMES,
    SETS,
    TABLE,
    error_of,
    request,
    wanted,
)
from tests.engine.test_mixes import random_adapter
from tests.tiny import tiny_model

CPU = torch.device("cpu")
MAP = PatchMap.of(MODEL)
FEW = Sampling(max_tokens=2, temperature=0, ignore_eos=True)


def packer(host_bytes: int = 1 << 20) -> AdapterPacker:
    return AdapterPacker(MAP, "triton", "float32", HostTier(host_bytes))


FRAME = 1 << 12


def frames(count: int = 200) -> DeviceFrames:
    return DeviceFrames(torch.zeros(count, FRAME, dtype=torch.uint8), tuple(MAP.weights))


def placed(adapter: DeltaSet, first: int, device: DeviceFrames | None = None) -> Packed:
    packed = packer(0).pack("x", lambda: adapter)
    run = Run(first, -(-packed.nbytes // FRAME))
    return (device or frames()).place("x", packed, run)


def test_an_adapter_is_one_buffer_and_says_what_the_file_says() -> None:
    packed = placed(SETS[0], 3)
    storages = {delta.data.untyped_storage().data_ptr() for delta in packed.deltas.values()}
    assert len(storages) == 1
    assert all(delta.data.data_ptr() % 64 == 0 for delta in packed.deltas.values())
    for name, place in MAP.places.items():
        rows = slice(place.row_offset, place.row_offset + place.rows)
        whole = to_dense(packed.deltas[place.weight])[rows]
        assert torch.equal(whole, torch.from_numpy(SETS[0].deltas[name].dense()))
    assert packed.table is not None
    assert torch.equal(packed.table, records([packed.deltas.get(name) for name in MAP.weights]))
    assert packed.nbytes > sum(delta.data.nbytes for delta in packed.deltas.values())


def test_frames_that_move_keep_their_content() -> None:
    block = torch.arange(6, dtype=torch.uint8)[:, None].repeat(1, FRAME)
    DeviceFrames(block, ()).move([Move(1, 4), Move(2, 5)])
    assert block[:, 0].tolist() == [0, 1, 2, 3, 1, 2]


def test_what_was_packed_once_is_not_read_again_until_it_is_let_go() -> None:
    size = packer().pack("x", lambda: SETS[0]).nbytes
    reads: list[str] = []
    two = packer(int(2.5 * size))

    def source(key: str) -> DeltaSet:
        reads.append(key)
        return ADAPTERS[key]

    for key in (NAMES[0], NAMES[1], NAMES[0], NAMES[2], NAMES[0], NAMES[1]):
        two.pack(key, lambda key=key: source(key))  # type: ignore[misc]
    assert reads == [NAMES[0], NAMES[1], NAMES[2], NAMES[1]]
    assert two.tier is not None
    assert two.tier.keys() == [NAMES[0], NAMES[1]]
    assert two.tier.nbytes == 2 * size


def test_the_tier_keeps_nothing_that_is_larger_than_itself() -> None:
    small, large = (Packed({}, buffer=torch.zeros(n, dtype=torch.uint8)) for n in (100, 200))
    tier = HostTier(150)
    tier.put("a", small)
    tier.put("b", large)
    assert tier.keys() == ["a"]
    tier.put("a", small)
    assert tier.nbytes == 100
    assert tier.get("b") is None
    assert HostTier(0).get("a") is None


def resident(index: int, kind: str = "element") -> Resident:
    made = SETS[index] if kind == "element" else random_adapter(TABLE, kind, 0.2, 0.1, index)
    return Resident.of(placed(made, 1))


def test_slots_stay_while_an_adapter_is_in_use_and_are_given_again() -> None:
    binding = DeviceBinding(MAP.weights, "float32", 3, CPU)
    residents = {key: resident(i) for i, key in enumerate("abc")}
    first = dict(binding.bind(["a", "b"], residents).slots)
    second = binding.bind(["b", "c"], residents)
    assert second.slots["b"] == first["b"]
    assert second.slots["c"] != second.slots["b"]
    third = binding.bind(["a", "b", "c"], residents)
    assert sorted(third.slots.values()) == [0, 1, 2]
    for key, slot in third.slots.items():
        for i, (name, weight) in enumerate(MAP.weights.items()):
            bound = third.deltas[name]
            table = residents[key].table
            assert table is not None
            assert torch.equal(bound.table[slot], table[i])
            assert bound.shape == weight.shape
    assert third.sides == ()
    binding.forget()
    assert len(binding.bind(["c"], residents).slots) == 1


def test_an_adapter_that_was_evicted_and_read_again_is_found_at_its_new_place() -> None:
    binding = DeviceBinding(MAP.weights, "float32", 2, CPU)
    old, new = resident(0), resident(0)
    binding.bind(["a"], {"a": old})
    bound = binding.bind(["a"], {"a": new})
    assert new.table is not None
    assert torch.equal(next(iter(bound.deltas.values())).table[bound.slots["a"]], new.table[0])
    assert not torch.equal(old.table, new.table)  # type: ignore[arg-type]


def test_tiles_are_announced() -> None:
    binding = DeviceBinding(MAP.weights, "float32", 2, CPU)
    bound = binding.bind(["a", "b"], {"a": resident(0), "b": resident(1, "block")})
    assert bound.sides == (16,)
    assert all(deltas.sides == (16,) for deltas in bound.deltas.values())


@pytest.mark.usefixtures("interpreter")
def test_interpret_a_full_device_is_one_requests_own_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = DeviceFrames._placed
    full = True
    name = next(iter(MAP.weights))
    rows = to_dense(placed(SETS[0], 0).deltas[name])

    def no_room(self: DeviceFrames, packed: Packed, run: Run) -> Packed:
        if full and torch.equal(to_dense(packed.deltas[name]), rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place(self, packed, run)

    monkeypatch.setattr(DeviceFrames, "_placed", no_room)
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse=False) as engine:
        bad, good = ask(
            engine, request("bad", MIXES[0], sampling=FEW), request("good", MIXES[1], sampling=FEW)
        )
        assert isinstance(error_of(bad), DeviceFull)
        assert tokens_of(good) == wanted(MIXES[1], count=2)
        assert engine.stats().load_failures == 1
        full = False
        again = ask(engine, request("again", MIXES[0], sampling=FEW))[0]
        assert tokens_of(again) == wanted(MIXES[0], count=2)
