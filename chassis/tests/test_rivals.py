"""Rivals queue: one at a time, nobody waits for ever, and nothing is kept of a queue in which nobody stands."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from chassis.errors import AlreadyExists, Invalid, Problem
from chassis.rivals import Rivals

GONE = AlreadyExists("GONE", "Somebody else has it.")


class Shop:
    """One thing to be had, those who want it, and in which order they did what."""

    def __init__(self, patience: float = 5) -> None:
        self.rivals = Rivals(patience)
        self.sold = False
        self.did: list[str] = []
        self.go = asyncio.Event()

    def come(self, name: str, end: Callable[[], Awaitable[None]] | None = None) -> asyncio.Task[str]:
        return asyncio.create_task(self._come(name, end or self.buy), name=name)

    async def _come(self, name: str, end: Callable[[], Awaitable[None]]) -> str:
        async def look() -> None:
            self.did.append(f"{name} looks")
            await asyncio.sleep(0.002)
            if self.sold:
                raise GONE

        try:
            async with self.rivals.turn("thing", look, "GONE"):
                self.did.append(f"{name} works")
                await self.go.wait()
                await end()
        except Problem as problem:
            return problem.reason
        return "has it"

    async def buy(self) -> None:
        if self.sold:
            raise GONE
        self.sold = True

    async def fail(self) -> None:
        raise Invalid("BROKE", "No money.")

    async def give_back(self) -> None:
        """Have it for a moment."""


async def soon() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def test_those_who_wait_look_once_and_do_no_work(shop: Shop) -> None:
    tasks = [shop.come(name) for name in "abc"]
    await soon()
    assert shop.did == ["a works"]
    shop.go.set()
    assert await asyncio.gather(*tasks) == ["has it", "GONE", "GONE"]
    assert shop.did == ["a works", "b looks", "c looks"]
    assert not shop.rivals._lines


async def test_after_a_failure_that_says_nothing_of_the_thing_the_next_one_works_without_a_look(shop: Shop) -> None:
    tasks = [shop.come("a", shop.fail), shop.come("b"), shop.come("c")]
    await soon()
    shop.go.set()
    assert await asyncio.gather(*tasks) == ["BROKE", "has it", "GONE"]
    assert shop.did == ["a works", "b works", "c looks"]


async def test_after_the_same_refusal_all_look(shop: Shop) -> None:
    shop.sold = True
    tasks = [shop.come(name) for name in "abc"]
    await soon()
    shop.go.set()
    assert await asyncio.gather(*tasks) == ["GONE"] * 3
    assert shop.did == ["a works", "b looks", "c looks"]


async def test_what_was_given_back_is_had_by_one_after_the_other(shop: Shop) -> None:
    tasks = [shop.come("a", shop.give_back), shop.come("b"), shop.come("c")]
    await soon()
    shop.go.set()
    assert await asyncio.gather(*tasks) == ["has it", "has it", "GONE"]
    assert [one for one in shop.did if "works" in one] == ["a works", "b works"]


async def test_who_comes_while_others_look_looks_too(shop: Shop) -> None:
    tasks = [shop.come("a"), shop.come("b")]
    await soon()
    shop.go.set()
    while "b looks" not in shop.did:
        await asyncio.sleep(0)
    tasks.append(shop.come("c"))
    assert await asyncio.gather(*tasks) == ["has it", "GONE", "GONE"]
    assert shop.did == ["a works", "b looks", "c looks"]


@pytest.mark.parametrize("cancelled", ["a", "b", "ab", "abc", "bc"])
async def test_who_is_cancelled_keeps_nobody_waiting(shop: Shop, cancelled: str) -> None:
    tasks = {name: shop.come(name) for name in "abcd"}
    await soon()
    for name in cancelled:
        tasks[name].cancel()
        await asyncio.sleep(0)  # the next one is called, and not there yet
    shop.go.set()
    left = [task for name, task in tasks.items() if name not in cancelled]
    assert await asyncio.gather(*left) == ["has it", *["GONE"] * (len(left) - 1)]
    await asyncio.wait(tasks.values())
    assert not shop.rivals._lines


async def test_all_cancelled_at_once_leave_nothing(shop: Shop) -> None:
    tasks = [shop.come(name) for name in "abc"]
    await soon()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert not shop.rivals._lines


async def test_nobody_waits_beyond_the_patience(shop: Shop) -> None:
    shop.rivals = Rivals(0.02)
    tasks = [shop.come(name) for name in "ab"]
    await asyncio.sleep(0.05)
    assert shop.did == ["a works", "b works"]
    tasks.append(shop.come("c"))
    await soon()
    assert shop.did == ["a works", "b works"], "c waits for its own patience"
    shop.go.set()
    assert await asyncio.gather(*tasks) == ["has it", "GONE", "GONE"]
    assert not shop.rivals._lines


async def test_an_error_in_the_look_is_the_callers_own(shop: Shop) -> None:
    async def look() -> None:
        raise OSError

    first = shop.come("a")
    await soon()

    async def other() -> None:
        async with shop.rivals.turn("thing", look, "GONE"):
            raise AssertionError("it had no turn")

    second = asyncio.create_task(other())
    third = shop.come("c")
    await soon()
    shop.go.set()
    with contextlib.suppress(OSError):
        await second
    assert await asyncio.gather(first, third) == ["has it", "GONE"]
    assert not shop.rivals._lines
