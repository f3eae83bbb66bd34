"""What one device holds of a recorded step, however the weights, gradients and optimizer states are divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cbd_hf.training_memory.recording import (
    ACTIVATIONS,
    LOSS,
    STUDENT_ROLE,
    TEACHER,
    Event,
    Recording,
    Weights,
)
from cbd_hf.training_memory.step import UPDATE_PHASE


SHARDINGS = ("0", "1", "2", "3", "fsdp2")
"""ZeRO stages (0: none, or DDP with several devices), and torch's `fully_shard`."""

# DeepSpeed's defaults, in elements, which recipes/accelerate_configs leave as they are.
_REDUCE_BUCKET = 500_000_000
_PREFETCH = 50_000_000
_PERSISTENT = 100_000
_MAX_LIVE = 1_000_000_000
_MAX_REUSE_DISTANCE = 1_000_000_000

# Further parts of the memory; the others are those of a recording.
WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER = "student_weights", "gathered_weights", "gradients", "optimizer"
TEACHER_WEIGHTS, COMMUNICATION = "teacher_weights", "communication"

_MASTER, _MOMENTS = 4, 8  # bytes per parameter: AdamW's two are float32


@dataclass(frozen=True)
class Division:
    """
    How a stage is divided over devices.

    Args:
        sharding (`str`): one of `SHARDINGS`.
        world_size (`int`): devices.
        teacher_placement (`str`): `"replicate"`, `"shard"` or `"offload"`.
        device (`str`): `"cpu"` or `"cuda"`.
        accumulates (`bool`): gradients of earlier micro-batches are there already.
    """

    sharding: str
    world_size: int
    teacher_placement: str
    device: str
    accumulates: bool


class _Ledger:
    """Bytes by part, and what they were at their largest."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.total = 0
        self.phase = ""
        self.peak = -1
        self.peak_phase = ""
        self.at_peak: dict[str, int] = {}

    def add(self, part: str, size: int) -> None:
        self.parts[part] += size
        self.total += size
        if size > 0 and self.total > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.total, self.phase, dict(self.parts)

    def briefly(self, part: str, size: int) -> None:
        self.add(part, size)
        self.add(part, -size)


def peak_memory(recording: Recording, division: Division) -> tuple[dict[str, int], str]:
    """
    The parts of the memory of one device when they are most, in bytes, and the phase of the step in which that is.

    It is a step behind the first, with the optimizer's state allocated.
    """
    ledger = _Ledger()
    student = {"3": _Zero3, "2": _Zero2, "1": _Zero1, "fsdp2": _Fsdp2}.get(division.sharding, _Whole)(
        recording.student, division, ledger
    )
    teacher = _teacher_of(recording.teacher, division, ledger)
    gone = set()
    parts: dict[int, tuple[str, int]] = {}
    for event in recording.events:
        if event.kind == "phase":
            ledger.phase = event.name
            if event.name == UPDATE_PHASE:
                student.update()
        elif event.kind == "allocate":
            parts[event.key] = event.name, event.size
            ledger.add(event.name, event.size)
        elif event.kind == "free":
            part, size = parts.pop(event.key)
            if event.key not in gone:
                ledger.add(part, -size)
        elif event.kind == "gradient":
            part, size = parts[event.other]
            # Beside the gradient itself: a sum or a bucket it goes to.
            if student.take_gradient(event.key):
                ledger.add(part, -size)
                gone.add(event.other)
            else:
                ledger.add(part, -size)
                ledger.add(GRADIENTS, size)
                parts[event.other] = GRADIENTS, size
        else:
            weights = student if event.name == STUDENT_ROLE else teacher
            (weights.use if event.kind == "use" else weights.used)(event)
    return {part: size for part, size in ledger.at_peak.items() if size}, ledger.peak_phase


class _Weights:
    """Weights that are simply there."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        self.weights = weights
        self.division = division
        self.ledger = ledger
        self.n = division.world_size

    def share(self, size: int) -> int:
        """The n-th part of something."""
        return -(-size // self.n)

    def use(self, event: Event) -> None:
        """A module is about to run."""

    def used(self, event: Event) -> None:
        """A module has run."""

    def take_gradient(self, index: int) -> bool:
        """Whether a gradient goes elsewhere, so that its own memory is free."""
        return False

    def update(self) -> None:
        """The optimizer's step."""


class _Whole(_Weights):
    """One device, or DDP: everything whole, and gradients a second time in DDP's buckets."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(WEIGHTS, weights.nbytes)
        ledger.add(OPTIMIZER, _MOMENTS * weights.total)
        if division.accumulates:
            ledger.add(GRADIENTS, weights.nbytes)
        if self.n > 1:
            ledger.add(COMMUNICATION, weights.nbytes)

    def take_gradient(self, index: int) -> bool:
        return self.division.accumulates


class _DeepSpeed(_Weights):
    """A bucket that gradients are copied to. A CPU's memory is taken when it is written, a GPU's when allocated."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        self.filled = 0
        self.touched = 0

    def allocate_bucket(self) -> None:
        if self.division.device != "cpu":
            self.ledger.add(COMMUNICATION, _REDUCE_BUCKET * self.weights.itemsize)

    def fill(self, index: int) -> bool:
        """Copy a gradient to the bucket; whether its own memory is free."""
        numel = self.weights.numels[index]
        if self.filled and self.filled + numel > _REDUCE_BUCKET:
            self.reduce()
        self.filled += numel
        if numel > _REDUCE_BUCKET:  # stays where it is, and is reduced with the next
            return False
        if self.division.device == "cpu" and self.filled > self.touched:
            self.ledger.add(COMMUNICATION, (self.filled - self.touched) * self.weights.itemsize)
            self.touched = self.filled
        return True

    def reduce(self) -> None:
        raise NotImplementedError


class _Zero1(_DeepSpeed):
    """The optimizer's state, with weights of its own, is divided."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(WEIGHTS, weights.nbytes)
        ledger.add(OPTIMIZER, self.share((_MASTER + _MOMENTS) * weights.total))
        if division.accumulates:
            ledger.add(GRADIENTS, weights.nbytes)

    def take_gradient(self, index: int) -> bool:
        return self.division.accumulates

    def reduce(self) -> None:
        self.ledger.briefly(COMMUNICATION, self.filled * self.weights.itemsize)
        self.filled = 0

    def update(self) -> None:
        # All gradients go through the bucket at the end.
        self.allocate_bucket()
        for index, numel in enumerate(self.weights.numels):
            if self.fill(index):
                self.ledger.add(GRADIENTS, -numel * self.weights.itemsize)
        self._end()

    def _end(self) -> None:
        self.reduce()
        own = self.share(self.weights.nbytes)
        self.ledger.add(GRADIENTS, own)
        self.ledger.add(COMMUNICATION, -self.ledger.parts[COMMUNICATION])
        self.ledger.briefly(GRADIENTS, self.share(_MASTER * self.weights.total))


class _Zero2(_Zero1):
    """Gradients are divided as well, when the bucket is full."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        _DeepSpeed.__init__(self, weights, division, ledger)
        ledger.add(WEIGHTS, weights.nbytes)
        ledger.add(OPTIMIZER, self.share((_MASTER + _MOMENTS) * weights.total))
        if division.accumulates:
            ledger.add(GRADIENTS, self.share(weights.nbytes))
        self.began = False

    def take_gradient(self, index: int) -> bool:
        if not self.began:
            self.allocate_bucket()
            self.began = True
        return self.fill(index)

    def update(self) -> None:
        self._end()


class _ZeroGathers:
    """
    Weights in shares, gathered module by module as DeepSpeed's coordinator does once it knows their order: ahead of
    their use, and kept if they are used again soon. What is gathered at once arrives in one piece, and is copied to
    its parameters when the first of them is used.
    """

    def __init__(
        self,
        weights: Weights,
        part: str,
        division: Division,
        ledger: _Ledger,
        prefetch: int = _PREFETCH,
        max_live: int = _MAX_LIVE,
        max_reuse_distance: int = _MAX_REUSE_DISTANCE,
    ) -> None:
        self.weights = weights
        self.part = part
        self.ledger = ledger
        self.prefetch = prefetch
        self.max_live = max_live
        self.max_reuse_distance = max_reuse_distance
        self.copies_on_the_way = division.device == "cpu"  # gloo's
        self.live: set[int] = set()
        self.live_numel = 0
        self.position = 0  # of the use that comes next
        self.ahead = 0  # uses up to here have been gathered for
        self.arriving: dict[int, frozenset[int]] = {}  # parameter -> all that arrive with it
        self.persistent = {index for index, numel in enumerate(weights.numels) if numel <= _PERSISTENT}
        ledger.add(part, self._size(self.persistent))

    def _size(self, members: Iterable[int]) -> int:
        return sum(self.weights.numels[member] for member in members) * self.weights.itemsize

    def use(self, event: Event) -> None:
        self.position += 1
        self._gather(event.members)
        for member in event.members:
            if group := self.arriving.get(member):
                self.ledger.briefly(self.part, self._size(group))
                for arrived in group:
                    del self.arriving[arrived]
        self.ahead = max(self.ahead, self.position)
        room, asked = min(self.prefetch, self.max_live - self.live_numel), 0
        wanted: set[int] = set()
        while self.ahead < len(self.weights.uses) and asked < room:
            new = set(self.weights.uses[self.ahead]) - self.live - self.persistent - wanted
            asked += sum(self.weights.numels[member] for member in new)
            wanted |= new
            self.ahead += 1
        self._gather(wanted)

    def release(self, members: tuple[int, ...]) -> None:
        """Free what is not used again soon."""
        again: set[int] = set()
        distance = 0
        for use, upcoming in enumerate(self.weights.uses[self.position :], self.position):
            if distance >= self.max_reuse_distance and use >= self.ahead:
                break
            again.update(upcoming)
            distance += sum(self.weights.numels[member] for member in upcoming)
        gone = set(members) & self.live - again
        self.live -= gone
        self.live_numel -= sum(self.weights.numels[member] for member in gone)
        self.ledger.add(self.part, -self._size(gone))

    def _gather(self, members: Iterable[int]) -> None:
        new = frozenset(members) - self.live - self.persistent
        self.live |= new
        self.live_numel += sum(self.weights.numels[member] for member in new)
        self.ledger.add(self.part, self._size(new))
        if self.copies_on_the_way:
            self.ledger.briefly(self.part, self._size(new))
        self.arriving |= dict.fromkeys(new, new)


class _Zero3(_DeepSpeed):
    """Weights are divided as well."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(WEIGHTS, self.share(weights.nbytes))
        ledger.add(OPTIMIZER, self.share((_MASTER + _MOMENTS) * weights.total))
        ledger.add(GRADIENTS, self.share(weights.nbytes))  # a buffer for good
        self.gathers = _ZeroGathers(weights, GATHERED, division, ledger)
        self.allocate_bucket()
        if division.device == "cpu":  # written in the steps before
            self.touched = min(weights.total, _REDUCE_BUCKET)
            ledger.add(COMMUNICATION, self.touched * weights.itemsize)

    def use(self, event: Event) -> None:
        self.gathers.use(event)

    def used(self, event: Event) -> None:
        self.gathers.release(event.members)

    def take_gradient(self, index: int) -> bool:
        self.gathers.release((index,))
        return self.fill(index)

    def reduce(self) -> None:
        copies = 2 if self.division.device == "cpu" else 1  # gloo makes one more
        self.ledger.briefly(COMMUNICATION, copies * self.filled * self.weights.itemsize)
        self.filled = 0

    def update(self) -> None:
        self.reduce()
        self.ledger.briefly(GRADIENTS, self.share(_MASTER * self.weights.total))


class _UnitGathers:
    """Weights in shares, gathered layer by layer as `fully_shard` does: one that runs, and the next on its way."""

    def __init__(self, weights: Weights, part: str, ledger: _Ledger, keep_root: bool) -> None:
        self.weights = weights
        self.part = part
        self.ledger = ledger
        self.keep_root = keep_root
        self.sizes: Counter[int] = Counter()
        for numel, unit in zip(weights.numels, weights.units, strict=True):
            self.sizes[unit] += numel * weights.itemsize
        self.order = [unit for members in weights.uses for unit in {weights.units[member] for member in members}]
        self.position = 0
        self.live: set[int] = set()

    def use(self, event: Event) -> None:
        unit = self.weights.units[event.members[0]]
        self.position += 1
        following = next((other for other in self.order[self.position :] if other not in (unit, -1)), unit)
        for other in {unit, following} - self.live:
            self.live.add(other)
            self.ledger.add(self.part, self.sizes[other])
        self.keep({unit, following, -1} if self.keep_root else {unit, following})

    def keep(self, units: set[int]) -> None:
        """Free all others."""
        for other in self.live - units:
            self.live.discard(other)
            self.ledger.add(self.part, -self.sizes[other])


class _Fsdp2(_Weights):
    """Everything is divided, layer by layer; a layer's gradient is divided as soon as it is complete."""

    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(WEIGHTS, self.share(_MASTER * weights.total))
        ledger.add(OPTIMIZER, self.share(_MOMENTS * weights.total))
        if division.accumulates:
            ledger.add(GRADIENTS, self.share(_MASTER * weights.total))
        self.gathers = _UnitGathers(weights, GATHERED, ledger, keep_root=True)
        self.missing = Counter(weights.units)
        self.pending = 0

    def use(self, event: Event) -> None:
        self.gathers.use(event)

    def take_gradient(self, index: int) -> bool:
        unit = self.weights.units[index]
        size = self.weights.numels[index] * self.weights.itemsize
        self.ledger.add(COMMUNICATION, size)
        self.missing[unit] -= 1
        if not self.missing[unit]:
            # The copy that is being reduced lives until the next layer's is made.
            whole = self.gathers.sizes[unit]
            self.ledger.add(COMMUNICATION, whole - self.pending)
            self.ledger.add(COMMUNICATION, -whole)
            self.pending = whole
            if not self.division.accumulates:
                self.ledger.add(GRADIENTS, self.share(whole // self.weights.itemsize * _MASTER))
        return True

    def update(self) -> None:
        self.gathers.keep(set())
        self.ledger.add(COMMUNICATION, -self.pending)


class _ResidentTeacher(_Weights):
    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(TEACHER_WEIGHTS, weights.nbytes)


class _OffloadedTeacher(_Weights):
    """One module's weights at a time; on a CPU they are where they are used."""

    def use(self, event: Event) -> None:
        self.ledger.add(TEACHER_WEIGHTS, self._size(event))

    def used(self, event: Event) -> None:
        self.ledger.add(TEACHER_WEIGHTS, -self._size(event))

    def _size(self, event: Event) -> int:
        return sum(self.weights.numels[member] for member in event.members) * self.weights.itemsize


class _ZeroTeacher(_Weights):
    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        if division.teacher_placement == "shard" or division.device == "cpu":
            ledger.add(TEACHER_WEIGHTS, self.share(weights.nbytes))
        layers: Counter[int] = Counter()
        for numel, unit in zip(weights.numels, weights.units, strict=True):
            layers[unit] += numel
        layer = max((numel for unit, numel in layers.items() if unit >= 0), default=0)
        # As place_teacher sets it: a layer is freed at once, and one is gathered ahead.
        self.gathers = _ZeroGathers(weights, TEACHER_WEIGHTS, division, ledger, layer, 2 * layer, 0)

    def use(self, event: Event) -> None:
        self.gathers.use(event)

    def used(self, event: Event) -> None:
        self.gathers.release(event.members)


class _ShardedTeacher(_Weights):
    def __init__(self, weights: Weights, division: Division, ledger: _Ledger) -> None:
        super().__init__(weights, division, ledger)
        ledger.add(TEACHER_WEIGHTS, self.share(weights.nbytes))
        self.gathers = _UnitGathers(weights, TEACHER_WEIGHTS, ledger, keep_root=True)

    def use(self, event: Event) -> None:
        self.gathers.use(event)

    def used(self, event: Event) -> None:
        if self.gathers.position == len(self.weights.uses) - 1:  # only the head is left
            self.gathers.keep(set())


def _teacher_of(weights: Weights, division: Division, ledger: _Ledger) -> _Weights:
    if division.sharding == "3":
        return _ZeroTeacher(weights, division, ledger)
    if division.teacher_placement == "offload" and division.device != "cpu":
        return _OffloadedTeacher(weights, division, ledger)
    if division.teacher_placement == "shard" and division.world_size > 1:
        return _ShardedTeacher(weights, division, ledger)
    return _ResidentTeacher(weights, division, ledger)


__all__ = [
    "ACTIVATIONS",
    "COMMUNICATION",
    "GATHERED",
    "GRADIENTS",
    "LOSS",
    "OPTIMIZER",
    "SHARDINGS",
    "TEACHER",
    "TEACHER_WEIGHTS",
    "WEIGHTS",
    "Division",
    "peak_memory",
]
