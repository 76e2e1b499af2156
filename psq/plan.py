"""The plan: everything the processes of one job must agree on, as bytes with a digest.

A worker sends its plan when it joins. The first one defines the job; a later one with another
digest is refused with a text that names the first thing in which they differ. The body is a
msgpack map in a fixed order, so equal plans are equal bytes. It is remote input: `Plan.parse`
accepts exactly what `Plan.body` makes and refuses everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from psq.codec import get_codec
from psq.errors import ConfigError, LocalError, RemotePlanError, RemoteWireError
from psq.layout import Layout, cut
from psq.recipe import Recipe
from psq_proto.frames import digest64
from psq_proto.messages import MAX_PAYLOAD_BYTES, PLAN_LIMITS
from psq_proto.packing import pack, unpack

__all__ = ["MAX_TENSORS", "MAX_WORLD_SIZE", "Plan"]

PLAN_FORMAT: Final = 1
MAX_TENSORS: Final = 65_536
MAX_DIMENSIONS: Final = 16
MAX_NUMEL: Final = 1 << 40
MAX_WORLD_SIZE: Final = 4096


@dataclass(frozen=True)
class Plan:
    """What is trained (names and shapes, in order), how (recipe), and by how many workers."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    recipe: Recipe
    world_size: int

    def __post_init__(self) -> None:
        """Refuse a plan no server could run: limits, codecs and shapes are checked here, once."""
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            msg = f"world_size must be 1..{MAX_WORLD_SIZE}, got {self.world_size}"
            raise ConfigError(msg)
        if len(self.tensors) > MAX_TENSORS:
            msg = f"the model has {len(self.tensors)} parameters, psq handles up to {MAX_TENSORS}"
            raise ConfigError(msg)
        get_codec(self.recipe.uplink.codec)
        get_codec(self.recipe.downlink.codec)

    @classmethod
    def of(
        cls, specs: Sequence[tuple[str, Sequence[int]]], recipe: Recipe, world_size: int
    ) -> Plan:
        """The plan of a model given as (name, shape) in order.

        Raises:
            ConfigError: the recipe, the world size or the model cannot be run, or the plan is over
            its size limit.
        """
        tensors = tuple((name, tuple(int(n) for n in shape)) for name, shape in specs)
        plan = cls(tensors, recipe, world_size)
        if len(plan.body) > MAX_PAYLOAD_BYTES:
            msg = (
                f"the plan takes {len(plan.body)} bytes, the limit is {MAX_PAYLOAD_BYTES}: "
                f"the model's {len(tensors)} parameter names are too long"
            )
            raise ConfigError(msg)
        return plan

    @cached_property
    def body(self) -> bytes:
        """The plan as it travels."""
        plain = {
            "format": PLAN_FORMAT,
            "world_size": self.world_size,
            "recipe": self.recipe.to_plain(),
            "tensors": [[name, list(shape)] for name, shape in self.tensors],
        }
        return pack(plain)

    @cached_property
    def digest(self) -> int:
        """64 bits that name this plan in every header."""
        return digest64(self.body)

    @cached_property
    def layout(self) -> Layout:
        """The cut into shards: the same in every process."""
        up, down = get_codec(self.recipe.uplink.codec), get_codec(self.recipe.downlink.codec)
        return cut(self.tensors, (up.nbytes, down.nbytes))

    @classmethod
    def parse(cls, body: bytes | memoryview) -> Plan:
        """The plan a peer sent.

        Raises:
            RemotePlanError: it is not a plan, is over a limit, or names a recipe or codec this
            side does not have.
        """
        try:
            plan = _from_plain(_unpack(body))
            _check_layout(plan)
        except LocalError as error:
            msg = f"the plan that came cannot be run here: {error}"
            raise RemotePlanError(msg) from error
        if plan.body != bytes(body):
            msg = "the plan that came is not in canonical form: it was not made by psq"
            raise RemotePlanError(msg)
        return plan

    def difference(self, other: Plan) -> str:
        """The first thing in which `other` departs from this plan, in words; empty if equal."""
        if self.world_size != other.world_size:
            return f"world_size: the job has {self.world_size}, it says {other.world_size}"
        mine, theirs = _leaves(self.recipe.to_plain()), _leaves(other.recipe.to_plain())
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"recipe {key}: the job has {mine.get(key)!r}, it says {theirs.get(key)!r}"
        for index, (a, b) in enumerate(zip(self.tensors, other.tensors, strict=False)):
            if a != b:
                return f"tensor {index}: the job has {_show(a)}, it says {_show(b)}"
        if len(self.tensors) != len(other.tensors):
            extra = max(self.tensors, other.tensors, key=len)[
                min(len(self.tensors), len(other.tensors))
            ]
            return (
                f"number of tensors: the job has {len(self.tensors)}, it says {len(other.tensors)} "
                f"(first unmatched: {_show(extra)})"
            )
        return ""


def _unpack(body: bytes | memoryview) -> Any:
    try:
        return unpack(body, PLAN_LIMITS, use_list=True)
    except RemoteWireError as error:
        msg = f"the plan that came is not msgpack within the limits: {error}"
        raise RemotePlanError(msg) from error


def _from_plain(plain: Any) -> Plan:
    if not isinstance(plain, dict) or set(plain) != {"format", "world_size", "recipe", "tensors"}:
        msg = "a plan is a map of format, world_size, recipe and tensors"
        raise ConfigError(msg)
    if plain["format"] != PLAN_FORMAT:
        came = plain["format"]
        msg = f"plan format {came!r}, this side reads {PLAN_FORMAT}: run the same psq everywhere"
        raise ConfigError(msg)
    if not isinstance(plain["recipe"], dict) or not isinstance(plain["tensors"], list):
        msg = "a plan's recipe is a map and its tensors are a list"
        raise ConfigError(msg)
    if type(plain["world_size"]) is not int:
        msg = f"world_size must be a whole number, got {plain['world_size']!r}"
        raise ConfigError(msg)
    tensors = tuple(_tensor(entry) for entry in plain["tensors"])
    return Plan(tensors, Recipe.from_plain(plain["recipe"]), plain["world_size"])


def _tensor(entry: Any) -> tuple[str, tuple[int, ...]]:
    match entry:
        case [str(name), list(shape)] if len(shape) <= MAX_DIMENSIONS and all(
            type(n) is int and 0 < n <= MAX_NUMEL for n in shape
        ):
            return name, tuple(shape)
    msg = (
        f"a tensor is [name, shape] with up to {MAX_DIMENSIONS} positive sizes, got {entry!r:.200}"
    )
    raise ConfigError(msg)


def _check_layout(plan: Plan) -> None:
    if not plan.tensors or len({name for name, _ in plan.tensors}) != len(plan.tensors):
        msg = f"a plan has tensors of different names, got {len(plan.tensors)} tensors"
        raise ConfigError(msg)
    total = 0
    for name, shape in plan.tensors:
        numel = 1
        for n in shape:
            numel *= n
        total += numel
        if total > MAX_NUMEL:
            msg = f"the model has over {MAX_NUMEL} values (at {name!r})"
            raise ConfigError(msg)


def _leaves(plain: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {prefix: plain}
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat.update(_leaves(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _show(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]!r} {list(tensor[1])}"
