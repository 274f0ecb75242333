"""Which replica a request goes to, asked of the policy itself: affinity, spreading, agreement of routers, prefixes."""

import random

from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.on_ray.serve.router import read
from adaptfleet.on_ray.serve.routing import MIN_STAY_S, SLACK, RecentPrefixes, Replica, Wanted, choose, most, prefixes, still_there


def _fleet(loads: list[int], holding: dict[int, set[str]] | None = None) -> list[Replica]:
    return [Replica(f"r{i}", load, frozenset((holding or {}).get(i, set()))) for i, load in enumerate(loads)]


def test_a_holder_gets_its_adapters_requests() -> None:
    fleet = _fleet([SLACK - 2, 0, 0, 0], {0: {"streets"}})
    assert choose(Wanted("streets"), fleet, RecentPrefixes()).id == "r0"


def test_a_hot_adapter_spreads_and_stays_with_who_got_it() -> None:
    """Twice what all other requests are, sent one by one: more than one replica comes to hold it, and none carries it all."""
    held: dict[int, set[str]] = {0: {"hot"}}
    loads = [0] * 4
    recent = RecentPrefixes()
    for _ in range(64):
        chosen = choose(Wanted("hot"), _fleet(loads, held), recent)
        number = int(chosen.id[1:])
        loads[number] += 1
        held.setdefault(number, set()).add("hot")
    assert max(loads) <= most(64, 4) + 1
    assert len(held) >= 3


def test_few_requests_do_not_spread() -> None:
    fleet = _fleet([SLACK - 1, 0], {0: {"quiet"}})
    assert choose(Wanted("quiet"), fleet, RecentPrefixes()).id == "r0"


def test_routers_agree_on_cold_adapters_and_a_lost_replica_moves_only_its_own() -> None:
    names = [f"adapter-{i}" for i in range(400)]
    five, four = _fleet([0] * 5), _fleet([0] * 4)
    homes = {name: choose(Wanted(name), five, RecentPrefixes()).id for name in names}
    shuffled = random.Random(1).sample(five, 5)
    assert homes == {name: choose(Wanted(name), shuffled, RecentPrefixes()).id for name in names}
    for name, home in homes.items():
        if home != "r4":
            assert choose(Wanted(name), four, RecentPrefixes()).id == home
    per_replica = [list(homes.values()).count(f"r{i}") for i in range(5)]
    assert min(per_replica) > 40, "1,000 adapters are to be shared out, not piled up"


def test_short_requests_are_forgotten_before_the_next_report() -> None:
    sent = [100.0, 109.0, 119.8]
    assert still_there(sent, told_at=105.0, stay_s=0.0, now=120.0) == [109.0, 119.8], "how long they stay is not known"
    assert still_there(sent, told_at=105.0, stay_s=30.0, now=120.0) == [109.0, 119.8], "long ones are there still"
    assert still_there(sent, told_at=105.0, stay_s=1.0, now=120.0) == [119.8]
    assert still_there(sent, told_at=105.0, stay_s=0.001, now=119.8 + MIN_STAY_S / 2) == [119.8], "clocks and hops take a while"
    assert still_there(sent, told_at=105.0, stay_s=0.001, now=119.8 + MIN_STAY_S) == []
    assert still_there(sent, told_at=119.9, stay_s=30.0, now=120.0) == [], "the report has them all"


def test_a_replica_that_takes_nothing_is_taken_only_alone() -> None:
    away = Replica("gone", 0, frozenset({"streets"}), is_taking=False)
    assert choose(Wanted("streets"), [away, Replica("r1", 3)], RecentPrefixes()).id == "r1"
    assert choose(Wanted("streets"), [away], RecentPrefixes()).id == "gone"


def test_a_conversation_stays_where_its_beginning_is_cached() -> None:
    recent = RecentPrefixes()
    text = "You are a clerk. " * 60
    first = choose(Wanted(None, prefixes("", text)), _fleet([0, 0, 0]), recent).id
    loads = [1 if f"r{i}" == first else 0 for i in range(3)]
    assert choose(Wanted(None, prefixes("", text + "And then?")), _fleet(loads), recent).id == first
    other = choose(Wanted(None, prefixes("", "Another beginning. " * 60)), _fleet(loads), recent).id
    assert other != first, "without a cached beginning, the least loaded"


def test_the_same_text_of_two_adapters_has_no_common_prefix() -> None:
    assert not set(prefixes("streets", "x" * 600)) & set(prefixes("people", "x" * 600))


@given(st.lists(st.tuples(st.integers(0, 500), st.booleans(), st.booleans()), min_size=1, max_size=12), st.booleans())
def test_nobody_is_sent_more_than_the_bound(fleet: list[tuple[int, bool, bool]], wants_adapter: bool) -> None:
    replicas = [Replica(f"r{i}", load, frozenset({"a"} if holds else ()), taking) for i, (load, holds, taking) in enumerate(fleet)]
    chosen = choose(Wanted("a" if wants_adapter else None), replicas, RecentPrefixes())
    taking = [replica for replica in replicas if replica.is_taking] or replicas
    assert chosen in taking
    assert chosen.load < most(sum(replica.load for replica in taking) + 1, len(taking))


def test_reads_names_of_every_form_and_bodies_of_every_kind() -> None:
    def name(model: str) -> str | None:
        return read(f'{{"model": "{model}", "prompt": "x"}}'.encode(), "tiny").adapter

    assert [name(form) for form in ("streets", "streets@3", "streets@canary", "tiny:streets", "tiny")] == ["streets"] * 4 + [None]
    assert name("../../etc/passwd") is None
    cut = b'{"model": "streets@2", "messages": [{"role": "user", "content": "' + b"x" * 9000
    assert read(cut, "tiny").adapter == "streets"
    for junk in (b"", b"[1]", b"\xff\xfe", b'{"model": 7}', b"[" * 100_000, b'{"model": "\\ud800"}', b'{"model": "a'):
        assert read(junk, "tiny").adapter is None
