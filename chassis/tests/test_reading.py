"""The short way of reads answers as the long one, and what is asked for together stays each caller's own."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from care.patients.v1 import consents_pb2, tasks_pb2
from sqlalchemy import or_, select

from chassis.errors import NotFound
from chassis.ids import new_id
from chassis.reading import Loader, Rows, Unfit
from chassis.tests.small import Small
from chassis.tests.test_pipeline import batch, item


class Ways:
    """Counts the statements that went the short way, and can close it."""

    def __init__(self, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short: list[str] = []
        self.long = 0
        self.closed = False
        loader = small.server.database._loader
        run = loader._fetch
        long_way = small.server.database._placed_session

        async def fetch(sql: str, together: Any) -> Any:
            if self.closed:
                raise OSError
            self.short.append(f"{len(together)} {sql[:6]}")
            return await run(sql, together)

        def session() -> Any:
            self.long += 1
            return long_way()

        monkeypatch.setattr(loader, "_fetch", fetch)
        monkeypatch.setattr(small.server.database, "_placed_session", session)


@pytest.fixture
def ways(small: Small, monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(small, monkeypatch)


async def both(small: Small, ways: Ways, method: str, **fields: Any) -> Any:
    """What both ways answer, which must be the same."""
    used = ways.long
    short = await small.rpc(method, **fields)
    assert ways.long == used, "it took the long way"
    ways.closed = True
    long = await small.rpc(method, **fields)
    ways.closed = False
    assert short == long
    return short


async def test_both_ways_answer_alike(small: Small, ways: Ways) -> None:
    patient = await small.patient()
    tasks = [await small.task(patient, due=timedelta(minutes=n), note=f"étage {n}") for n in range(3)]
    await small.rpc("ClaimTask", id=tasks[0].id)
    for _ in range(2):
        await small.consent(patient)
    assert (await both(small, ways, "GetTask", id=tasks[0].id)).history
    assert len((await both(small, ways, "ListTasks", patient_id=patient)).tasks) == 3
    page = await both(small, ways, "ListTasks", patient_id=patient, page_size=2)
    assert [task.id for task in page.tasks] == [task.id for task in tasks[:2]]
    assert page.next_page_token
    active = [consents_pb2.Consent.Status.ACTIVE]
    assert len((await both(small, ways, "ListConsents", patient_id=patient, statuses=active)).consents) == 2
    gone = [consents_pb2.Consent.Status.INACTIVE]
    assert not (await both(small, ways, "ListConsents", patient_id=patient, statuses=gone)).consents
    assert len((await both(small, ways, "ListConsents", patient_id=patient)).consents) == 2


async def test_the_next_page_goes_on_where_the_short_way_ended(small: Small) -> None:
    patient = await small.patient()
    wanted = [(await small.task(patient, due=timedelta(minutes=n))).id for n in range(5)]
    found, token = [], ""
    while True:
        page = await small.rpc("ListTasks", patient_id=patient, page_size=2, page_token=token)
        found += [task.id for task in page.tasks]
        if not (token := page.next_page_token):
            break
    assert found == wanted


async def test_reads_that_come_together_go_in_one_statement_and_stay_their_callers(small: Small, ways: Ways) -> None:
    clinics = [new_id() for _ in range(6)]
    patients = [await small.patient(clinic, small.clinic) for clinic in clinics]
    tasks = [await small.task(patient, note=f"note {n}") for n, patient in enumerate(patients)]
    for number, clinic in enumerate(clinics):
        await small.harness.staff(f"only-{number}", ["tasks.read"], clinics=[clinic])
    items = [
        item(small, "TasksService/ListTasks", tasks_pb2.ListTasksRequest(patient_id=patient), f"only-{number}")
        for number in range(6)
        for patient in patients
    ]
    ways.short.clear()
    results = await batch(small, items)
    assert any(one.startswith("36 ") for one in ways.short), ways.short
    for place, result in enumerate(results):
        number, patient = divmod(place, 6)
        if number == patient:
            (seen,) = tasks_pb2.ListTasksResponse.FromString(result.response).tasks
            assert seen.id == tasks[patient].id
        else:
            # Somebody else's, or read through in vain: never another one's rows.
            assert result.code or not tasks_pb2.ListTasksResponse.FromString(result.response).tasks


async def test_filters_of_every_type_are_joined_and_answer_as_alone(small: Small, ways: Ways) -> None:
    patient = await small.patient()
    for number in range(3):
        await small.task(patient, due=timedelta(minutes=number), note='{"étage", NULL}')
        await small.consent(patient)
    active = consents_pb2.Consent.Status.ACTIVE
    asked = [
        ("TasksService/ListTasks", tasks_pb2.ListTasksRequest(patient_id=patient)),
        ("TasksService/ListTasks", tasks_pb2.ListTasksRequest(codes=['a"b', "", "null", "x\\y", "{c}"])),
        ("ConsentsService/ListConsents", consents_pb2.ListConsentsRequest(patient_id=patient, statuses=[active])),
    ]
    for method, request in asked:
        alone = await batch(small, [item(small, method, request, "ada")])
        used, ways.short = ways.long, []
        together = await batch(small, [item(small, method, request, "ada")] * 3)
        assert ways.long == used, "it took the long way"
        assert any(one.startswith("3 ") for one in ways.short), ways.short
        assert [each.code for each in together] == [0, 0, 0]
        assert {each.response for each in together} == {alone[0].response}


async def test_lists_arrive_as_they_were_given(small: Small) -> None:
    lists: list[list[str | None]] = [
        ['a"b', "", "null", "NULL", "x\\y", "{c}", None, " a b ", "é,ü", "'"],
        [],
        ["plain"],
    ]
    loader = small.server.database._loader
    asked = [loader.fetch("SELECT $1::TEXT[] AS found, $2::VARCHAR(40)[] AS again", [one, one]) for one in lists]
    assert await asyncio.gather(*asked) == [[[one, one]] for one in lists]


async def test_what_is_written_is_never_joined(small: Small, ways: Ways) -> None:
    task = await small.task(await small.patient())
    ways.short.clear()
    await asyncio.gather(*(small.rpc("GetTask", id=task.id) for _ in range(8)))
    assert all(one.startswith("1 ") for one in ways.short if "INSERT" in one)
    assert any("INSERT" in one for one in ways.short)


async def test_one_that_fails_takes_nobody_along_and_goes_the_long_way(small: Small, ways: Ways) -> None:
    patient = await small.patient()
    task = await small.task(patient)
    good = item(small, "TasksService/GetTask", tasks_pb2.GetTaskRequest(id=task.id), "ada")
    bad = item(small, "TasksService/GetTask", tasks_pb2.GetTaskRequest(id=str(task.id)[:-1] + "g"), "ada")
    results = await batch(small, [good, bad, good])
    assert [bool(one.code) for one in results] == [False, True, False]


async def test_a_condition_with_a_value_in_it_is_not_compiled_in(small: Small) -> None:
    Task: Any = small.models.Task
    statements = small.server.database.statements
    async with small.server.database.hot_reading() as reading:
        for clause in (Task.note != "", Task.code.in_(["x"]), or_(Task.code == "x", Task.note == "y")):
            with pytest.raises(Unfit):
                await statements.fetch(reading, Rows(Task).where(clause), lambda: select(Task), {})


def test_an_absent_filter_filters_nothing(small: Small) -> None:
    Task: Any = small.models.Task
    wanted = (
        Rows(Task).given(Task.code, "").given(Task.code, None).since(Task.due_time, None).before(Task.due_time, None)
    )
    wanted.among(Task.id, []).outside(Task.id, []).overlap(Task.security_labels, [])
    assert not wanted.terms
    assert not wanted.values
    # What a request must name is no option: without it no row, never all.
    assert Rows(Task).equal(Task.code, "").values == [""]


async def test_what_must_be_named_finds_nothing_without_a_name(small: Small) -> None:
    Task: Any = small.models.Task
    await small.task(await small.patient())
    async with small.server.database.hot_reading() as reading:
        found = await small.server.database.statements.fetch(
            reading, Rows(Task).equal(Task.code, ""), lambda: select(Task), {}
        )
    assert found == []


@pytest.mark.parametrize("method", ["GetPool", "UpdatePool"])
async def test_an_empty_id_names_no_row(small: Small, method: str) -> None:
    pool = await small.pool()

    async def hook(_: Any, call: Any) -> None:
        await call.get(small.models.Pool, "")

    small.hooks[method] = hook
    wanted: dict[str, Any] = {"id": pool.id} if method == "GetPool" else {"pool": pool, "etag": pool.etag}
    with pytest.raises(NotFound):
        await small.rpc(method, **wanted)


async def test_a_read_that_nobody_waits_for_harms_no_other() -> None:
    class Connection:
        def is_closed(self) -> bool:
            return False

        async def fetch(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
            await asyncio.sleep(0.01)
            return [(place, value) for place, value in enumerate(arguments[0], 1)]

    class Connections:
        async def take(self) -> tuple[float, Any]:
            return 0.0, Connection()

        def give_back(self, taken: Any, *, broken: bool) -> None:
            assert not broken

    loader = Loader(Connections(), 2)  # type: ignore[arg-type]
    asked = [asyncio.create_task(loader.fetch("SELECT $1::INTEGER", [n])) for n in range(4)]
    await asyncio.sleep(0)
    asked[1].cancel()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [one for one in found if not isinstance(one, BaseException)] == [[[0]], [[2]], [[3]]]
