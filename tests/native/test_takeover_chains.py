"""A server is killed at every place of one chain; it comes back once, whole and with a call.

Places: see takeover_steps.
"""

from __future__ import annotations

import pytest
from vhostd._native import Handler

from tests.native.rig import Layout
from tests.native.takeover_life import Life, Variant
from tests.native.takeover_sweep import HANDLERS, PAGES, Chains, Kept, Request, ring_size, sweep

SPLIT, PACKED = Variant(Layout()), Variant(Layout(packed=True, event_idx=True))
OTHERS = [
    Variant(Layout(event_idx=True), in_order=True),
    Variant(Layout(event_idx=True, indirect=True)),
    Variant(Layout(packed=True), in_order=True),
    Variant(Layout(packed=True, event_idx=True, indirect=True)),
]
CASES = [
    *((handler, variant) for handler in HANDLERS for variant in (SPLIT, PACKED)),
    *((Handler.INFLATE, variant) for variant in OTHERS),
]


@pytest.mark.parametrize(
    ("handler", "variant"), CASES, ids=[f"{handler.name}-{variant}" for handler, variant in CASES]
)
def test_it_comes_back_once_wherever_its_server_is_killed(
    handler: Handler, variant: Variant
) -> None:
    with Life.begin(variant, HANDLERS, ring_size(variant)) as life, Kept.of(life) as kept:
        chains = Chains(life, handler)
        inflate, deflate = Chains(life, Handler.INFLATE), Chains(life, Handler.DEFLATE)
        on_the_way: list[tuple[int, int]] = []  # token, how many were given back before

        def prepare() -> None:
            if handler is Handler.DEFLATE:
                inflate.exchange()

        def post() -> None:
            before = chains.given_back
            on_the_way.append((chains.send(), before))

        def look() -> bytes:
            return kept.bytes() + chains.bytes()

        def done() -> bool:
            return chains.given_back > on_the_way[0][1]

        def check() -> None:
            token, _ = on_the_way.pop()
            chains.await_one(token)
            inflated = life.origin.balloon_counters().inflated_pages
            assert inflated == (len(PAGES) if handler is Handler.INFLATE else 0)
            if handler is Handler.INFLATE:
                deflate.exchange()
            chains.exchange()
            if handler is Handler.INFLATE:
                deflate.exchange()

        request = Request(prepare, post, look, done, check)
        sweep(life, request, alone=handler is not Handler.CONTROL)
