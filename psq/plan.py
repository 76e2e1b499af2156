"""The plan: everything the processes of one job must agree on, as bytes with a digest.

A worker sends its plan when it joins. The first one defines the job; a later one with another
digest is refused with a text that names the first thing in which they differ. A job with several
servers has one plan for each, alike but for the number of the server. The body is a
msgpack map in a fixed order, so equal plans are equal bytes. It is remote input: `Plan.parse`
accepts exactly what `Plan.body` makes and refuses everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, Final

from psq.clock import parse_consistency
from psq.codec import Codec, get_codec
from psq.errors import ConfigError, LocalError, RemotePlanError, RemoteWireError
from psq.groups import DEFAULT_GROUP, Group, check_groups, group_from_plain
from psq.layout import Layout, PayloadSize, Shard, cut
from psq.plan_checks import (
    check_codecs,
    check_rules,
    check_stale,
    check_whole,
    downlink_codecs,
    uplink_codecs,
)
from psq.recipe import Recipe
from psq_proto.frames import digest64
from psq_proto.messages import MAX_PAYLOAD_BYTES, PLAN_LIMITS
from psq_proto.packing import pack, unpack

__all__ = ["MAX_SERVERS", "MAX_TENSORS", "MAX_WORLD_SIZE", "Group", "Plan"]

PLAN_FORMAT: Final = 3
MAX_TENSORS: Final = 65_536
MAX_DIMENSIONS: Final = 16
MAX_NUMEL: Final = 1 << 40
MAX_WORLD_SIZE: Final = 4096
MAX_SERVERS: Final = 256
_KEYS: Final = (
    *("format", "world_size", "servers", "server", "consistency"),
    *("recipe", "groups", "tensors"),
)


@dataclass(frozen=True)
class Plan:
    """What is trained (names and shapes, in order), how (recipe), and by how many workers.

    And by how many servers: this is the plan of server number `server` of them.

    Attributes:
        groups: what some tensors do otherwise; group 0 is the recipe as it stands.
        members: the group of each tensor; empty stands for group 0.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    recipe: Recipe
    world_size: int
    _: KW_ONLY
    server: int = 0
    servers: int = 1
    consistency: str = "bsp"
    groups: tuple[Group, ...] = (DEFAULT_GROUP,)
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a plan no server could run: limits, codecs and shapes are checked here, once."""
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            msg = f"world_size must be 1..{MAX_WORLD_SIZE}, got {self.world_size}"
            raise ConfigError(msg)
        if not 1 <= self.servers <= MAX_SERVERS or not 0 <= self.server < self.servers:
            msg = (
                f"a job has 1..{MAX_SERVERS} servers, numbered from 0; "
                f"got server {self.server} of {self.servers}"
            )
            raise ConfigError(msg)
        consistency = parse_consistency(self.consistency)
        if consistency.quorum > self.world_size:
            msg = f"a quorum of {consistency.quorum} is more than the {self.world_size} workers"
            raise ConfigError(msg)
        object.__setattr__(self, "consistency", consistency.text)
        if len(self.tensors) > MAX_TENSORS:
            msg = f"the model has {len(self.tensors)} parameters, psq handles up to {MAX_TENSORS}"
            raise ConfigError(msg)
        members = self.members or (0,) * len(self.tensors)
        check_groups(self.groups, members, len(self.tensors))
        object.__setattr__(self, "members", members)
        for group in self.groups:
            check_codecs(self.recipe, group)
        if consistency.max_staleness != 0:
            check_stale(self.recipe, self.consistency)
        check_whole(self.recipe, self.groups, self.servers)
        _check_replicas(self)
        check_rules(self.recipe, self.world_size)

    @classmethod
    def of(  # noqa: PLR0913 - all that the processes of a job agree on
        cls,
        specs: Sequence[tuple[str, Sequence[int]]],
        recipe: Recipe,
        world_size: int,
        *,
        server: int = 0,
        servers: int = 1,
        consistency: str = "bsp",
        groups: Sequence[Group] = (DEFAULT_GROUP,),
        members: Sequence[int] = (),
    ) -> Plan:
        """The plan of a model given as (name, shape) in order.

        Args:
            specs: the tensors.
            recipe: the algorithm.
            world_size: how many workers.
            server: this server's number.
            servers: how many there are.
            consistency: see `psq.clock`.
            groups: group 0, which is `psq.groups.DEFAULT_GROUP`, and others.
            members: the group of each tensor; empty: all are of group 0.

        Raises:
            ConfigError: the recipe, the numbers of workers and servers, the consistency or the
            model cannot be run, or the plan is over its size limit.
        """
        tensors = tuple((name, tuple(int(n) for n in shape)) for name, shape in specs)
        plan = cls(
            tensors,
            recipe,
            world_size,
            server=server,
            servers=servers,
            consistency=consistency,
            groups=tuple(groups),
            members=tuple(members),
        )
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
            "servers": self.servers,
            "server": self.server,
            "consistency": self.consistency,
            "recipe": self.recipe.to_plain(),
            "groups": [group.to_plain() for group in self.groups],
            "tensors": [
                [name, list(shape), group]
                for (name, shape), group in zip(self.tensors, self.members, strict=True)
            ],
        }
        return pack(plain)

    @cached_property
    def digest(self) -> int:
        """64 bits that name this plan in every header."""
        return digest64(self.body)

    @cached_property
    def job_digest(self) -> int:
        """64 bits that name the job, whichever of its servers this plan is for."""
        return self.for_server(0).digest

    @cached_property
    def layout(self) -> Layout:
        """The cut into shards, and whose they are: the same in every process.

        Raises:
            ConfigError: there is nothing to cut, or not enough for so many servers.
        """
        return _cut(self)

    @cached_property
    def owned(self) -> tuple[Shard, ...]:
        """The shards of this plan's server, in ascending order of their index in the job."""
        layout = self.layout
        return tuple(
            shard
            for shard, owner in zip(layout.shards, layout.owners, strict=True)
            if owner == self.server
        )

    @property
    def replicas(self) -> int:
        """How many ranks, one after another, compute the same on the same data."""
        aggregate = self.recipe.aggregate
        return int(dict(aggregate.options)["replicas"]) if aggregate.kind == "coded" else 1

    @property
    def data_world_size(self) -> int:
        """How many ranks have data, and seeds, of their own."""
        return self.world_size // self.replicas

    def data_rank(self, rank: int) -> int:
        """Whose data, and whose seeds, a rank has: of `data_world_size`."""
        return rank // self.replicas

    def group_of(self, shard: int) -> Group:
        """The group whose tensors a shard of the job holds."""
        return self.groups[self.layout.shards[shard].group]

    def uplink_codecs(self, shard: int) -> tuple[str, ...]:
        """Specs of the codecs that a push of a shard may be written in, the usual one first."""
        return self._codecs[0][self.layout.shards[shard].group]

    def downlink_codecs(self, shard: int) -> tuple[str, ...]:
        """Specs of the codecs that an answer may be written in, the usual one first."""
        return self._codecs[1][self.layout.shards[shard].group]

    def rate_of(self, shard: int) -> float:
        """What the step's learning rate is multiplied by for a shard."""
        return self.group_of(shard).lr

    def pushes(self, shard: int) -> bool:
        """Whether workers push a shard; if not, only the server moves it."""
        return self.group_of(shard).pushed

    def due(self, shard: int, round: int) -> bool:  # noqa: A002 - the word of the field
        """Whether a round moves a shard: with the uplink's `every` k, each k-th round does.

        The shards of a server take turns in the order of their indexes, so that about as many are
        due in each round; those that are not stay as they are.
        """
        return self.due_after(shard, round) == round

    def due_after(self, shard: int, version: int) -> int:
        """The first round from this one on that moves a shard: until then its weights are these."""
        every = self.recipe.uplink.every
        return version + -(version + self._places[shard]) % every

    def turns(self, shard: int, version: int) -> int:
        """How many rounds up to a version have moved a shard: what its rules count by."""
        every, place = self.recipe.uplink.every, self._places[shard]
        return (version - 1 + place) // every - (place - 1) // every

    def due_shards(self, round: int) -> tuple[int, ...]:  # noqa: A002 - as above
        """The shards of this plan's server that a round moves, ascending; there always is one."""
        return self._turns[round % len(self._turns)]

    def pushed_shards(self, round: int) -> tuple[int, ...]:  # noqa: A002 - as above
        """Those of them that workers push."""
        due = self.due_shards(round)
        return due if self._all_pushed else tuple(shard for shard in due if self.pushes(shard))

    @cached_property
    def _codecs(self) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
        """Of each group: specs up, and specs down."""
        ups = tuple(uplink_codecs(self.recipe, group) for group in self.groups)
        return ups, tuple(downlink_codecs(self.recipe, group) for group in self.groups)

    @cached_property
    def _all_pushed(self) -> bool:
        return all(group.pushed for group in self.groups)

    @cached_property
    def _turns(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(shard.index for shard in self.owned if self.due(shard.index, turn))
            for turn in range(self.recipe.uplink.every)
        )

    @cached_property
    def _places(self) -> tuple[int, ...]:
        """Of each shard of the job: which of its server's it is."""
        counts = [0] * self.servers
        places: list[int] = []
        for owner in self.layout.owners:
            places.append(counts[owner])
            counts[owner] += 1
        return tuple(places)

    def for_server(self, server: int) -> Plan:
        """The same job as its server number `server` has it.

        Raises:
            ConfigError: the job has no such server.
        """
        if server == self.server:
            return self
        other = replace(self, server=server)
        if "layout" in self.__dict__:
            other.__dict__["layout"] = self.layout  # the cut is the job's, not a server's
        return other

    @classmethod
    def parse(cls, body: bytes | memoryview, *, cuttable: bool = True) -> Plan:
        """The plan a peer sent.

        Args:
            body: what came.
            cuttable: whether it has to be one that can be cut. A plan that is only looked at need
                not: some hundred bytes can ask for a second of cutting.

        Raises:
            RemotePlanError: it is not a plan, is over a limit, or names a recipe or codec this
            side does not have.
        """
        try:
            plan = _from_plain(_unpack(body))
            _check_numel(plan)
            # What cannot be cut is refused here, not where it is first used; but a plan of some
            # hundred bytes may have 65,536 shards, so nothing keeps them before its worker joins.
            if cuttable:
                _cut(plan)
        except LocalError as error:
            msg = f"the plan that came cannot be run here: {error}"
            raise RemotePlanError(msg) from error
        if plan.body != bytes(body):
            msg = "the plan that came is not in canonical form: it was not made by psq"
            raise RemotePlanError(msg)
        return plan

    def difference(self, other: Plan) -> str:
        """The first thing in which `other` departs from this plan, in words; empty if equal."""
        if fault := _difference_of_numbers(self, other):
            return fault
        mine, theirs = _leaves(self.recipe.to_plain()), _leaves(other.recipe.to_plain())
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"recipe {key}: the job has {mine.get(key)!r}, it says {theirs.get(key)!r}"
        if fault := _difference_of_groups(self, other):
            return fault
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


def _difference_of_numbers(job: Plan, other: Plan) -> str:
    if job.servers != other.servers:
        return (
            f"servers: the job has {job.servers}, it says {other.servers}: "
            f"list all servers in every --connect"
        )
    if job.server != other.server:
        return (
            f"server: this one is {job.server} of {job.servers} in the job, it says "
            f"{other.server} of {other.servers}: "
            f"list the servers in the same order in every --connect"
        )
    if job.consistency != other.consistency:
        return f"consistency: the job has {job.consistency}, it says {other.consistency}"
    if job.world_size != other.world_size:
        return f"world_size: the job has {job.world_size}, it says {other.world_size}"
    return ""


def _difference_of_groups(job: Plan, other: Plan) -> str:
    for index, (a, b) in enumerate(zip_longest(job.groups, other.groups)):
        if a != b:
            return f"group {index}: the job has {a or 'none'}, it says {b or 'none'}"
    names = zip(job.tensors, job.members, other.members, strict=False)
    for (name, _), mine, theirs in names:
        if job.tensors == other.tensors and mine != theirs:
            return (
                f"group of {name!r}: the job has {job.groups[mine].name!r}, "
                f"it says {other.groups[theirs].name!r}"
            )
    return ""


def _check_replicas(plan: Plan) -> None:
    """Groups of equal workers, in rounds that are one and the same for all of a group."""
    if plan.replicas == 1:
        return
    fault = ""
    if plan.world_size % plan.replicas:
        fault = f"{plan.world_size} workers cannot be put into groups of {plan.replicas}"
    elif plan.consistency != "bsp":
        fault = (
            f"it needs bsp, got {plan.consistency}: ranks of a group stand in for each other only "
            "while they compute every round from the same weights"
        )
    elif plan.servers > 1:
        fault = (
            f"it needs one server, got {plan.servers}: a rank that is late for one and not for "
            "another would say other bytes than its twins"
        )
    elif plan.recipe.direction.kind == "gaussian":
        fault = "noise that is each worker's secret makes replicas differ"
    if fault:
        msg = f"recipe {plan.recipe.name!r} with aggregate coded:replicas={plan.replicas}: {fault}"
        raise ConfigError(msg)


def _unpack(body: bytes | memoryview) -> Any:
    try:
        return unpack(body, PLAN_LIMITS, use_list=True)
    except RemoteWireError as error:
        msg = f"the plan that came is not msgpack within the limits: {error}"
        raise RemotePlanError(msg) from error


def _from_plain(plain: Any) -> Plan:
    came = plain.get("format") if isinstance(plain, dict) else None
    if type(came) is int and came != PLAN_FORMAT:
        msg = f"plan format {came}, this side reads {PLAN_FORMAT}: run the same psq everywhere"
        raise ConfigError(msg)
    if not isinstance(plain, dict) or set(plain) != set(_KEYS) or came != PLAN_FORMAT:
        msg = f"a plan is a map of {', '.join(_KEYS)}"
        raise ConfigError(msg)
    lists = (plain["groups"], plain["tensors"])
    if not isinstance(plain["recipe"], dict) or not all(isinstance(each, list) for each in lists):
        msg = "a plan's recipe is a map, its groups and its tensors are lists"
        raise ConfigError(msg)
    for name in ("world_size", "servers", "server"):
        if type(plain[name]) is not int:
            msg = f"{name} must be a whole number, got {plain[name]!r:.80}"
            raise ConfigError(msg)
    if not isinstance(plain["consistency"], str):
        msg = f"consistency must be text, got {plain['consistency']!r:.80}"
        raise ConfigError(msg)
    entries = [_tensor(entry) for entry in plain["tensors"]]
    return Plan(
        tuple((name, shape) for name, shape, _ in entries),
        Recipe.from_plain(plain["recipe"]),
        plain["world_size"],
        server=plain["server"],
        servers=plain["servers"],
        consistency=plain["consistency"],
        groups=tuple(group_from_plain(entry) for entry in plain["groups"]),
        members=tuple(group for _, _, group in entries),
    )


def _tensor(entry: Any) -> tuple[str, tuple[int, ...], int]:
    match entry:
        case [str(name), list(shape), group] if (
            type(group) is int
            and len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int and 0 < n <= MAX_NUMEL for n in shape)
        ):
            return name, tuple(shape), group
    msg = (
        f"a tensor is [name, shape, group] with up to {MAX_DIMENSIONS} positive sizes, "
        f"got {entry!r:.200}"
    )
    raise ConfigError(msg)


def _cut(plan: Plan) -> Layout:
    uplink = plan.recipe.uplink
    first, *others = (_sizes(plan.recipe, group) for group in plan.groups)
    layout = cut(
        plan.tensors, first, plan.servers, uplink.every, members=plan.members, others=others
    )
    fewest = min(layout.owners.count(server) for server in range(plan.servers))
    if fewest < uplink.every:
        msg = (
            f"every={uplink.every} needs as many shards on each server, the model makes {fewest}: "
            f"set it to {fewest} or less"
        )
        raise ConfigError(msg)
    return layout


def _sizes(recipe: Recipe, group: Group) -> tuple[PayloadSize, ...]:
    """Payload bytes each way of a group's segment: of its longest codec, since any may be used."""
    ups = uplink_codecs(recipe, group) if group.pushed else ()
    ways = [[get_codec(spec) for spec in way] for way in (ups, downlink_codecs(recipe, group))]
    return tuple(_longest(way) for way in ways if way)


def _longest(codecs: Sequence[Codec]) -> PayloadSize:
    if len(codecs) == 1:
        return codecs[0].nbytes
    return lambda numel: max(codec.nbytes(numel) for codec in codecs)


def _check_numel(plan: Plan) -> None:
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
