"""What a worker's process leaves to the next one: kept while it trains, taken up when it begins.

    say a shard    compress -> save its new vectors and the payload -> send          `said`
    end of a round save what came back to refused shards -> say where the worker
                   stands: version, identities, random numbers, what the script
                   keeps -> copy the weights                                          `close_round`

A round counts as begun with the weights, vectors and random numbers of its start, and is gone
through once more by a process that comes after a crash: gradients are computed again, and of each
shard that was said the same bytes are, with the vectors as they were after it. So the rounds that
follow are those that would have followed. Whatever is not complete is as if it had never been: what
a shard's record says is true of it whole, or it has another record.

What came back to a shard at the end of its round (a refused push, a change of units) is saved once,
under a record that says so, and not taken twice.

Never here: when something is sent, and what a server makes of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from psq.client import Attempt, Identity, Kept, Pending
from psq.durable.checkpoint import Checkpoint
from psq.durable.failpoints import reach
from psq.durable.slots import Record, Slots, Spec, Stage
from psq.errors import StateError, UsageError
from psq.feedback import Compressor, ShardCounts
from psq.plan import Plan
from psq.torch.asked import Asked
from psq.torch.averaging import Averaging
from psq.torch.chance import random_state, set_random_state
from psq.torch.copies import Copies, Copy
from psq.torch.decoder import RETURN, Decoder
from psq.torch.folder import WorkerFolder
from psq.torch.parameters import ParameterTable
from psq.torch.values import pack, unpack

__all__ = ["Keeper", "Load", "Save"]

Save: TypeAlias = Callable[[], Any]
Load: TypeAlias = Callable[[Any], object]

FORMAT: Final = 1
_log = logging.getLogger("psq.torch")


class Keeper:
    """See the module's docstring.

    Memory, in the fast files, for each parameter: twice what the vectors of the worker take, twice
    a payload, once (with recipe "average" twice) the replica's planes; `Slots.nbytes` has it all.

    Args:
        folder: where it is kept.
        plan: the job.
        rank: this worker's.
        seed: the job's.
        table: the replica and the model.
        model: whose buffers and local parameters are kept too.
        compressor: whose vectors are kept.
        decoder: whose state all replicas have alike.
        averaging: the user's optimizer, with recipe "average".

    Attributes:
        resumed: this process goes on from what another has kept.
        lost: why it cannot go on from what another has left in the fast files.
        copies: durable copies.
        settled: shards that have taken back already what comes back to them in the round at hand.
        waiting: shards that were not due in the round at hand, and have been seen to.
    """

    def __init__(  # noqa: PLR0913 - all that a worker's state is in
        self,
        folder: WorkerFolder,
        plan: Plan,
        *,
        rank: int,
        seed: int,
        table: ParameterTable,
        model: nn.Module,
        compressor: Compressor,
        decoder: Decoder,
        averaging: Averaging | None,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._table = table
        self._own_places = _own_places(model, table)
        self._compressor = compressor
        self._decoder = decoder
        self._averaging = averaging
        self._shards = plan.layout.shards
        self._twice = plan.recipe.apply.kind == RETURN
        self._spec = Spec(
            job=f"format={FORMAT} plan={plan.job_digest:016x} rank={rank} seed={seed}",
            layout=plan.layout,
            arrays=compressor.state_arrays(),
            payload_bytes=[compressor.nbytes(shard.index) for shard in self._shards],
            planes=decoder.planes,
            twice=self._twice,
        )
        self._slots = _open_slots(folder, self._spec)
        self.copies = Copies(folder.copies, rank)
        self.lost = "it is damaged" * self._slots.replaced
        self._files = [
            os.open(folder.say(which), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for which in range(2)
        ]
        self._count, self._which = self._slots.worker
        self._dirty: set[int] = set()
        self._script: dict[str, tuple[Save, Load]] = {}
        self._found: dict[str, Any] = {}
        self._begun: dict[int, Record] = {}
        self._is_from_disk = False
        self.resumed = False
        self.settled: set[int] = set()
        self.waiting: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Of the slots."""
        return self._slots.nbytes

    # ---- a round

    def said(self, shard: int, number: int, asked: Asked, payload: NDArray[np.uint8]) -> None:
        """A shard was compressed in this round and is about to be sent."""
        self._save(shard, Stage.SAID, number, asked, payload)

    def left_out(self, shard: int, number: int, asked: Asked) -> None:
        """A shard is not said in this round because it is not finite."""
        self._save(shard, Stage.SKIPPED, number, asked)

    def waits(self, shard: int, number: int, asked: Asked) -> None:
        """What a shard has to say waits in the residual: it is not its turn."""
        self._save(shard, Stage.WAITS, number, asked)

    def silent(self, number: int, asked: Asked) -> None:
        """Nothing will be said in this round."""
        self._slots.note_silent(number, asked.rate, asked.weight)

    def changed(self, shards: Iterable[int]) -> None:
        """The vectors of these shards are not those of their records any more."""
        self._dirty.update(shards)

    def close_round(self, version: int, identities: Sequence[Identity]) -> None:
        """The round is over, and its weights are in place: from now on the next one counts."""
        if self._dirty:
            reach("keeper.settle")
        for shard in sorted(self._dirty):
            self._settle(shard)
        self._dirty.clear()
        self.settled.clear()
        self.waiting.clear()
        which = 1 - self._which
        versions = {k: v for each in identities for k, v in each.versions.items()}
        if self._twice:
            self._save_weights(versions, which)
        self._say(which, self._standing(version, identities))
        if not self._twice:
            self._save_weights(versions, 0)
        if servers := self.copies.wanted(version):
            self.copies.write(self._copy(version, identities, servers))

    def begin_anew(self, version: int, identities: Sequence[Identity]) -> None:
        """Nobody was before this process: what there is now is the beginning."""
        self._slots.flip(0, 0)
        self._slots.note_silent(-1, 0.0, 1)
        for shard in self._shards:
            self._save(shard.index, Stage.INITIAL, -1, Asked(0.0))
        self.close_round(version, identities)

    def _settle(self, shard: int) -> None:
        """Save a shard as it is now, under the record of its round."""
        before = self._slots.record(shard)
        asked, payload, number = Asked(0.0), None, -1
        if before is not None:
            asked, number = Asked(before.rate, before.weight), before.number
            payload = self._slots.payload(shard, before) if before.payload_bytes else None
        self._save(shard, Stage.SETTLED, number, asked, payload)

    def _save(
        self,
        shard: int,
        stage: int,
        number: int,
        asked: Asked,
        payload: NDArray[np.uint8] | None = None,
    ) -> None:
        counts = self._compressor.counts(shard)
        record = Record(
            number=number,
            rate=asked.rate,
            weight=asked.weight,
            payload_bytes=0 if payload is None else payload.size,
            codec=counts.codec,
            steps=counts.steps,
            moments=counts.moments,
            rule=counts.rule,
            stage=stage,
            has_residual=counts.has_residual,
            told=counts.told,
        )
        self._slots.save(shard, record, payload)
        self._dirty.discard(shard)

    def _standing(self, version: int, identities: Sequence[Identity]) -> bytes:
        """Where the worker stands, beside vectors and weights."""
        versions = {k: v for each in identities for k, v in each.versions.items()}
        said = {
            "version": version,
            "identities": [
                [i.run_id, i.lineage, i.resolved, i.version, i.epoch] for i in identities
            ],
            "versions": np.array([versions[shard.index] for shard in self._shards], np.int64),
            "chance": random_state(),
            "script": self._found.get("script", {})
            | {name: save() for name, (save, _) in self._script.items()},
            "model": dict(self._own_tensors()),
            "optimizer": None if self._averaging is None else self._averaging.state(),
        }
        return pack(said, "what this worker keeps")

    def _copy(self, version: int, identities: Sequence[Identity], servers: tuple[int, ...]) -> Copy:
        """All of it as of now, to be written aside. Cost: a copy of the vectors."""
        arrays = {f"state.{k}": v.copy() for k, v in self._spec.arrays.items()}
        if self._twice:  # nobody else has these
            for shard in self._shards:
                arrays[f"weights.{shard.index}"] = self._table.flat_weights(shard.index)
        counts = [list(astuple(self._compressor.counts(each.index))) for each in self._shards]
        standing = self._standing(version, identities)
        meta = {"job": self._spec.job, "counts": counts, "standing": standing}
        return Copy(version, servers, arrays, meta)

    def _say(self, which: int, data: bytes) -> None:
        os.pwrite(self._files[which], data, 0)
        reach("keeper.close")
        self._count, self._which = self._count + 1, which
        self._slots.flip(self._count, which)
        reach("keeper.closed")

    def _save_weights(self, versions: Mapping[int, int], which: int) -> None:
        rule = self._decoder.rule
        if self._averaging is not None:
            self._table.fetch()
        for shard in self._shards:
            planes: list[Sequence[NDArray[np.float32]]] = [self._table.weights(shard.index)]
            if rule is not None:
                planes += [[rule.of(name, shard.index)] for name in self._decoder.shared]
            self._slots.save_weights(shard.index, versions[shard.index], planes, which)

    def _own_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What the model has beside the parameters of the job, as it is now."""
        for name, module, attribute in self._own_places:
            yield name, getattr(module, attribute)

    # ---- going on

    def attempts(self) -> list[Attempt]:
        """What this process may go on from, the best first."""
        found: list[tuple[int, Attempt]] = []
        try:
            slots = self._read()
            found += [slots] if slots is not None else []
        except StateError as error:
            self.lost = str(error)
        if self.lost:
            words = "%s holds nothing that one could go on from: %s"
            _log.warning(words, self._folder.fast, self.lost)
        for each in self.copies.found():
            found += self._from_copy(each)
        # The newest first: offering an older one makes a server forget what it knows of the rank.
        found.sort(key=lambda pair: -pair[0])
        return [attempt for _, attempt in found]

    def _from_copy(self, copy: Checkpoint) -> list[tuple[int, Attempt]]:
        """What a durable copy is worth; nothing, where it is another job's."""
        if copy.meta.get("job") != self._spec.job:
            _log.warning("%s is of another job, or of other settings of it", copy.path)
            return []
        said = unpack(bytes(copy.meta["standing"]), str(copy.path))
        versions = dict(enumerate(said["versions"].tolist())) if self._twice else {}
        identities = [
            self._identity(server, entry, {}, versions)
            for server, entry in enumerate(said["identities"])
        ]
        name = f"its copy of version {copy.version}, {copy.path}"
        return [(copy.version, Attempt(name, identities, lambda: self._load_copy(copy, said)))]

    def _load_copy(self, copy: Checkpoint, said: dict[str, Any]) -> None:
        arrays = copy.read_all()  # checked whole before anything is changed
        for name, vector in self._spec.arrays.items():
            vector[:] = arrays[f"state.{name}"]
        counts = {k: ShardCounts(*each) for k, each in enumerate(copy.meta["counts"])}
        self._compressor.recall(counts)
        if self._twice:
            for shard in self._shards:
                self._put_weights(shard.index, arrays[f"weights.{shard.index}"])
        self._found = said
        self.resumed = True
        self._is_from_disk = True

    def _read(self) -> tuple[int, Attempt] | None:
        """What the slots hold; None: nothing.

        Raises:
            StateError: it is damaged, or does not go together.
        """
        if not self._count:
            return None
        size = os.fstat(self._files[self._which]).st_size
        said = unpack(os.pread(self._files[self._which], size, 0), "what this worker kept")
        records = [self._slots.record(shard.index) for shard in self._shards]
        if any(record is None for record in records):
            msg = "a shard has no record"
            raise StateError(msg)
        known = [record for record in records if record is not None]
        wanted = dict(enumerate(said["versions"].tolist()))
        have = {shard: self._slots.weights(shard, self._weights_which)[0] for shard in wanted}
        intact = {shard: version for shard, version in wanted.items() if have[shard] == version}
        identities = [
            self._identity(server, entry, dict(enumerate(known)), intact)
            for server, entry in enumerate(said["identities"])
        ]
        pending = [each.pending.number for each in identities if each.pending is not None]
        begun = pending and any(record.payload_bytes for record in known)
        self._check_counts(known[:1] if begun and len(known) > 1 else known)
        if pending and len(intact) < len(wanted):
            msg = f"round {pending[0]} was begun, and the weights that it began with are torn"
            raise StateError(msg)
        attempt = Attempt(
            f"what it kept in {self._folder.fast} at version {said['version']}"
            + (f", round {pending[0]} begun" if pending else ""),
            identities,
            lambda: self._load(said, known, intact),
        )
        return int(said["version"]), attempt

    @property
    def _weights_which(self) -> int:
        return self._which if self._twice else 0

    def _identity(
        self,
        server: int,
        entry: Sequence[Any],
        records: Mapping[int, Record],
        intact: Mapping[int, int],
    ) -> Identity:
        run_id, lineage, resolved, version, epoch = entry
        owned = [k for k, owner in enumerate(self._plan.layout.owners) if owner == server]
        if any(records[shard].number > version for shard in owned if shard in records):
            msg = f"a shard is of a later round than version {version}"
            raise StateError(msg)
        return Identity(
            run_id,
            lineage,
            resolved,
            version,
            {shard: intact[shard] for shard in owned if shard in intact},
            self._pending(version, owned, records) if records else None,
            epoch,
        )

    def _pending(
        self, number: int, owned: Sequence[int], records: Mapping[int, Record]
    ) -> Pending | None:
        begun = [shard for shard in owned if records[shard].number == number]
        spoken = [k for k in begun if records[k].payload_bytes or records[k].stage == Stage.SKIPPED]
        silent, rate, weight = self._slots.silent
        if silent == number:
            due = self._plan.due_shards(number)
            skipped = frozenset(k for k in owned if k in due and self._plan.pushes(k))
            return Pending(number, rate, weight, skipped=skipped, silent=True)
        if not spoken:
            return None
        first = records[spoken[0]]
        pushed = {
            shard: Kept(self._slots.payload(shard, records[shard]), records[shard].codec)
            for shard in spoken
            if records[shard].payload_bytes
        }
        skipped = frozenset(spoken).difference(pushed)
        return Pending(number, first.rate, first.weight, pushed, skipped)

    def _check_counts(self, records: Sequence[Record]) -> None:
        try:
            self._compressor.check_recall({k: _counts_of(each) for k, each in enumerate(records)})
        except UsageError as error:
            raise StateError(str(error)) from error

    def _load(
        self, said: dict[str, Any], records: Sequence[Record], intact: Mapping[int, int]
    ) -> None:
        """Put it all in its place, but for what is to be done last: see `load_script`.

        What was said already is as it was before: the round is gone through once more.
        """
        begun, first = {}, {}
        for shard, entry in self._by_shard(said["identities"]):
            record = first[shard] = records[shard]
            if record.number != entry[3]:
                continue
            begun[shard] = record
            before = self._slots.record_before(shard)
            if before is not None and before.number < record.number:
                first[shard] = before
            if record.stage == Stage.SETTLED:
                self.settled.add(shard)
            if record.stage == Stage.WAITS:
                self.waiting.add(shard)
        self._begun = begun
        self._restore(first)
        for shard in intact:
            self._load_weights(shard)
        self._found = said
        self.resumed = True

    def take_said(self) -> None:
        """What the process before this one has said is said now: be as it was after that."""
        begun, self._begun = self._begun, {}
        if begun:
            self._restore(begun)

    def _restore(self, records: Mapping[int, Record]) -> None:
        self._slots.restore(records)
        self._compressor.recall({k: _counts_of(each) for k, each in sorted(records.items())})

    def _by_shard(self, entries: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        return ((shard, entries[owner]) for shard, owner in enumerate(self._plan.layout.owners))

    def _load_weights(self, shard: int) -> None:
        numel = self._shards[shard].numel
        planes = self._slots.weights(shard, self._weights_which)[1].reshape(-1, numel)
        self._put_weights(shard, planes[0])
        rule = self._decoder.rule
        if rule is not None:
            for plane, name in zip(planes[1:], self._decoder.shared, strict=True):
                rule.of(name, shard)[:] = plane

    def _put_weights(self, shard: int, values: NDArray[np.float32]) -> None:
        at = 0
        for segment in self._table.weights(shard):
            segment[:] = values[at : at + segment.size]
            at += segment.size

    @torch.no_grad()
    def load_script(self, version: int, identities: Sequence[Identity]) -> None:
        """Last of all: the model's own tensors, the user's optimizer, the random numbers.

        Args:
            version: of the weights there are.
            identities: who the worker is.
        """
        if not self.resumed:
            return
        kept = self._found["model"]
        for name, tensor in self._own_tensors():
            if name in kept and tensor.shape == kept[name].shape:
                tensor.copy_(kept[name])
            else:
                msg = f"{name!r} of the model is not among what was kept: its value is a new one"
                _log.warning("%s", msg)
        if self._averaging is not None:
            self._averaging.load_state(self._found["optimizer"])
        set_random_state(self._found["chance"])
        if self._is_from_disk:  # the slots know nothing of it yet
            self.begin_anew(version, identities)
        else:
            self._keep_what_came(version, identities)

    def _keep_what_came(self, version: int, identities: Sequence[Identity]) -> None:
        """Keep weights that a server had to give: a round that begins with them is to have them."""
        if self._twice or any(identity.pending is not None for identity in identities):
            return  # they were all here
        begun = [entry[3] for entry in self._found["identities"]]
        if begun != [identity.version for identity in identities] and not self._begun:
            self.close_round(version, identities)  # the job has gone on meanwhile
        else:
            self._save_weights({k: v for i in identities for k, v in i.versions.items()}, 0)

    def keep(self, name: str, save: Save, load: Load) -> None:
        """Keep something of the script's, and give it back if there was one before.

        Raises:
            UsageError: the name is taken, or what `save` returns cannot be kept.
        """
        if name in self._script:
            msg = f"keep: {name!r} is kept already: give it another name"
            raise UsageError(msg)
        self._script[name] = (save, load)
        kept = self._found.get("script", {})
        if name in kept:
            load(kept[name])
        else:
            pack(save(), name)  # what cannot be kept is refused here, and not after a round

    # ---- the end

    def close(self, *, done: bool) -> None:
        """Leave what is kept to the next process, or to nobody if the job is done."""
        if not self._files:
            return  # it was closed before
        self.copies.close()
        while self._files:
            os.close(self._files.pop())
        self._slots.close()
        try:
            if done:
                self._folder.remove()
            else:
                self._folder.park()
        finally:
            self._folder.close()


def _open_slots(folder: WorkerFolder, spec: Spec) -> Slots:
    try:
        return Slots(folder.slots, spec)
    except StateError as error:
        if not folder.leave_memory():
            raise
        _log.warning("%s; it is kept on the disk, in %s", error, folder.fast)
        return Slots(folder.slots, spec)


def _own_places(model: nn.Module, table: ParameterTable) -> list[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of each buffer and each parameter that the job leaves alone.

    Walking a model takes longer than copying a small one, so it is done once.
    """
    mine = {id(parameter) for parameter in table.parameters}
    names = [name for name, _ in model.named_buffers()]
    names += [n for n, p in model.named_parameters() if id(p) not in mine and p.requires_grad]
    paths = [name.rpartition(".") for name in names]
    return [(".".join(filter(None, (p, a))), model.get_submodule(p), a) for p, _, a in paths]


def _counts_of(record: Record) -> ShardCounts:
    return ShardCounts(
        steps=record.steps,
        moments=record.moments,
        rule=record.rule,
        codec=record.codec,
        has_residual=record.has_residual,
        told=record.told,
    )
