"""Any order of what servers do with one directory, deaths at any byte among it.

Whatever happens: nothing is restored that was not written so, the files are never
over the limit, and what a server counts is what is there.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from mlx_safe.kv.format import Node
from mlx_safe.kv.store import Limits, Store
from support.kv_files import (
    IDENTITY,
    Died,
    MortalFiles,
    drafts,
    on_disk,
    opened,
    restored,
)

# Blocks of three texts that begin alike; a node's file takes 4096 bytes here.
TEXTS = st.builds(
    lambda words, tail: [w for word in words for w in [word] * 256] + [9] * tail,
    st.lists(st.integers(0, 1), max_size=4),
    st.integers(0, 255),
)
SERVERS = st.integers(0, 1)


class Servers(RuleBasedStateMachine):
    @initialize(nodes=st.integers(1, 9))
    def begin(self, nodes: int) -> None:
        self.limits = Limits(nodes * 4096, free=0)
        self.path = Path(tempfile.mkdtemp(prefix="kv"))
        self.files = [MortalFiles(), MortalFiles()]
        self.stores: list[Store] = [self._start(i) for i in (0, 1)]
        # Files with which somebody has tampered, and nodes that must not come back.
        self.suspect: set[Node] = set()
        self.tampered = False

    def _start(self, server: int) -> Store:
        self.files[server] = MortalFiles()
        return opened(self.path, self.limits, self.files[server])

    def _dies(self, server: int) -> None:
        self.files[server].forget()
        self.stores[server].close()
        self.stores[server] = self._start(server)
        assert not list(self.path.glob("*/tmp-*"))
        assert self.stores[server].nbytes == on_disk(self.path)

    def teardown(self) -> None:
        for store, files in zip(
            getattr(self, "stores", []), getattr(self, "files", []), strict=False
        ):
            files.forget()
            store.close()
        shutil.rmtree(getattr(self, "path", "/nonexistent"), ignore_errors=True)

    @rule(server=SERVERS, tokens=TEXTS, snapshot=st.booleans())
    def write(self, server: int, tokens: list[int], snapshot: bool) -> None:
        store = self.stores[server]
        for draft in drafts(tokens, snapshot=snapshot):
            if store.publish(draft):
                self.suspect.discard(draft.node)
        assert store.off is None
        if drafts(tokens, snapshot=snapshot):  # else it has not looked
            assert store.nbytes == on_disk(self.path)

    @rule(
        server=SERVERS,
        tokens=TEXTS,
        snapshot=st.booleans(),
        steps=st.integers(0, 9000),
        power=st.none() | st.randoms(use_true_random=False),
    )
    def die_while_writing(
        self,
        server: int,
        tokens: list[int],
        snapshot: bool,
        steps: int,
        power: random.Random | None,
    ) -> None:
        self.files[server].die_after(steps, power)
        try:
            for draft in drafts(tokens, snapshot=snapshot):
                if self.stores[server].publish(draft):
                    self.suspect.discard(draft.node)
        except Died:
            # What was renamed when it died may be there or not.
            self.suspect -= {d.node for d in drafts(tokens, snapshot=snapshot)}
        self._dies(server)

    @rule(server=SERVERS, tokens=TEXTS)
    def withdraw(self, server: int, tokens: list[int]) -> None:
        before = set(self.path.glob("*/*.kv"))
        for draft in drafts(tokens):
            written = self.stores[server].publish(draft, lambda rename: False)
            assert not written or self.stores[server].has(draft.node)
        assert set(self.path.glob("*/*.kv")) <= before

    @rule(server=SERVERS, tokens=TEXTS, states=st.booleans())
    def restore(self, server: int, tokens: list[int], states: bool) -> None:
        store = self.stores[server]
        found = store.find(IDENTITY, tokens, len(tokens), blocks=True, states=states)
        mark = store.begin_restore(found.nodes if found else ())
        assert mark is not None
        given = restored(store, tokens, states=states)
        store.end_restore(mark)
        store.tell()  # that it has removed what was damaged; the writer does it
        assert not self.suspect & set(given)
        # Also after a power failure: data comes before the name.
        if not self.tampered:
            assert len(given) == len(found.nodes if found else ())

    @rule(server=SERVERS, tokens=TEXTS)
    def die_while_restoring(self, server: int, tokens: list[int]) -> None:
        found = self.stores[server].find(
            IDENTITY, tokens, len(tokens), blocks=True, states=False
        )
        if found is None:
            return
        assert self.stores[server].begin_restore(found.nodes) is not None
        self.suspect |= set(found.nodes)
        self.stores[server].close()
        # The other one sees it before there is a new one.
        assert not self.suspect & set(restored(self.stores[1 - server], tokens))
        self.files[server].forget()
        self.stores[server] = self._start(server)
        assert not self.suspect & set(restored(self.stores[server], tokens))
        for store in self.stores:
            store.tell()

    @rule(server=SERVERS, tokens=TEXTS)
    def drop(self, server: int, tokens: list[int]) -> None:
        dropped = {draft.node for draft in drafts(tokens, snapshot=True)}
        self.stores[server].drop(dropped)
        self.suspect |= dropped
        self.stores[server].tell()

    @rule(server=SERVERS, chance=st.randoms(use_true_random=False))
    def damage(self, server: int, chance: random.Random) -> None:
        files = sorted(self.path.glob("*/*.kv"))
        if not files:
            return
        self.tampered = True
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        how = chance.choice(["flip", "cut", "foreign", "link"] if data else ["foreign"])
        if how == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif how == "cut":
            data = data[: chance.randrange(len(data))]
        elif how == "foreign":
            other = chance.choice(files)
            if other == file:
                return
            data = bytearray(other.read_bytes())
        else:
            other = file.with_name("elsewhere")
            other.write_bytes(data)
            file.unlink()
            file.symlink_to(other)
            self._look_again()
            return
        file.write_bytes(data)
        self._look_again()

    def _look_again(self) -> None:
        """As when it had been so at their start."""
        for server in (0, 1):
            self.files[server].forget()
            self.stores[server].close()
            self.stores[server] = self._start(server)

    @invariant()
    def is_within_the_limit(self) -> None:
        if hasattr(self, "limits"):
            assert on_disk(self.path) <= self.limits.size
            assert all(store.off is None for store in self.stores)


TestServers = Servers.TestCase
TestServers.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
