// Reads a calendar from standard input as any program would and says which instants it shows, as JSON.
import { readFileSync } from "node:fs";
import ICAL from "ical.js";

const calendar = new ICAL.Component(ICAL.parse(readFileSync(0, "utf8")));
const events = calendar.getAllSubcomponents("vevent").map((one) => new ICAL.Event(one));
const told = events.map((event) => ({
  uid: event.uid,
  start: event.startDate.toUnixTime(),
  end: event.endDate.toUnixTime(),
  sequence: event.sequence,
  status: event.component.getFirstPropertyValue("status"),
  summary: event.summary,
  location: event.location,
}));
process.stdout.write(JSON.stringify(told));
