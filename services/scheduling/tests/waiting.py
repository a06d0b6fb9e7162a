"""A desk at which people wait: entries, freed slots and offers, and the questions that tests ask of them."""

import asyncio

from care.scheduling.v1 import waitlist_pb2 as pb
from care.scheduling.v1.waitlist_pb2_grpc import WaitlistLinksServiceStub, WaitlistServiceStub

from chassis.clients import call
from services.scheduling.tests.desk import OVERLAPS, WORK, Desk

WAITING = [*WORK, "waitlist.read", "waitlist.write", "waitlist.answer", "measures.read"]
ALWAYS_OPEN = {"offers_from": "00:00", "offers_until": "00:00", "backfill_every": 0.1, "backfill_retry": 0.1}


class WaitingDesk(Desk):
    """Calls as staff who keep the waitlist."""

    async def open(self, zone="America/New_York", **clinic):
        await super().open(zone, **clinic)
        self.elsewhere = await self.a_clinic()
        clinics = [self.clinic, self.elsewhere]
        await self.harness.staff("wilma", WAITING, clinics=clinics, clearances=["ETH"])
        return self

    async def waitlist(self, method, request, subject="wilma"):
        return await self.harness.call("scheduling", WaitlistServiceStub, method, request, subject)

    async def enlist(self, patient="", visit_type="", **wishes):
        """A patient on the waitlist."""
        patient = patient or await self.a_patient()
        request = pb.CreateWaitlistEntryRequest(
            patient_id=patient, visit_type_id=visit_type or self.visit, waitlist_entry=wishes
        )
        return await self.waitlist("CreateWaitlistEntry", request)

    async def entry(self, entry):
        return await self.waitlist("GetWaitlistEntry", pb.GetWaitlistEntryRequest(id=entry.id))

    async def offers(self, entry):
        """All offers to an entry, the latest first."""
        answer = await self.waitlist("ListWaitlistOffers", pb.ListWaitlistOffersRequest(entry_ids=[entry.id]))
        return list(answer.waitlist_offers)

    async def accept(self, offer_id):
        return await self.waitlist("AcceptWaitlistOffer", pb.AcceptWaitlistOfferRequest(id=offer_id))

    async def decline(self, offer_id):
        return await self.waitlist("DeclineWaitlistOffer", pb.DeclineWaitlistOfferRequest(id=offer_id))

    async def until(self, entry, status):
        """Wait until an entry is in a status; answers it."""
        async with asyncio.timeout(10):
            while True:
                found = await self.entry(entry)
                if pb.WaitlistEntry.Status.Name(found.status) == status:
                    return found
                await asyncio.sleep(0.02)

    async def until_slot(self, start, *statuses):
        """Wait until what became of a freed slot is one of these; answers the row."""
        async with asyncio.timeout(10):
            while True:
                rows = await self.sql(
                    "SELECT * FROM freed_slot WHERE start_time = :start ORDER BY create_time DESC", start=start
                )
                if rows and rows[0].status in statuses:
                    return rows[0]
                await asyncio.sleep(0.02)

    async def link(self, offer_id):
        """The token of an offer's link, as notifications asks for it."""
        request = pb.IssueWaitlistOfferLinkRequest(tenant_id=self.harness.tenant_id, offer_id=offer_id)
        stub = WaitlistServiceStub(self.harness.channel("scheduling"))
        metadata = self.harness.as_service("notifications")
        return (await call(stub.IssueWaitlistOfferLink, request, metadata)).token

    async def by_link(self, token, accept=None):
        """What the page behind a link shows, or becomes with an answer. Raises Problem."""
        stub = WaitlistLinksServiceStub(self.harness.channel("scheduling"))
        metadata = self.harness.as_service("gateway")
        if accept is None:
            return await call(stub.GetWaitlistOfferByLink, pb.GetWaitlistOfferByLinkRequest(token=token), metadata)
        request = pb.AnswerWaitlistOfferByLinkRequest(token=token, accept=accept)
        return await call(stub.AnswerWaitlistOfferByLink, request, metadata)

    async def wrong(self):
        """Whatever must never be, by the tables' own words: each row is a defect."""
        twice = await self.sql(
            "SELECT practitioner_id, start_time FROM waitlist_offer WHERE status = 'OPEN'"
            " GROUP BY 1, 2 HAVING count(*) > 1"
        )
        booked = await self.sql(
            "SELECT practitioner_id, start_time FROM appointment WHERE status = 'BOOKED' GROUP BY 1, 2 HAVING count(*) > 1"
        )
        torn = await self.sql(
            "SELECT e.id FROM waitlist_entry e LEFT JOIN waitlist_offer o ON o.id = e.offer_id"
            " LEFT JOIN appointment a ON a.id = e.offer_id WHERE"
            " (e.status = 'OFFERED' AND (o.status IS DISTINCT FROM 'OPEN' OR a.status NOT IN ('PENDING', 'CANCELLED')))"
            " OR (e.status = 'ACCEPTED' AND (o.status IS DISTINCT FROM 'ACCEPTED' OR a.status <> 'BOOKED'))"
        )
        return [*twice, *booked, *torn, *await self.sql(OVERLAPS)]


__all__ = ["ALWAYS_OPEN", "WAITING", "WaitingDesk"]
