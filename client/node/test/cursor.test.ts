/** What a watcher makes of what a daemon should not send, and of a log that was replaced. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { DaemonUnavailable, EventsLost, InternalError, OutOfRange } from "../src/errors.js";
import { Event } from "../src/gen/finetuned/v1/event.js";
import { Task, TaskState } from "../src/gen/finetuned/v1/task.js";
import { Snapshot, type WatchTaskResponse } from "../src/gen/finetuned/v1/task_service.js";
import { Cursor } from "../src/watch.js";

function cursor(afterSeq = 0, logEpoch = "", untilEnd = false): Cursor {
  return new Cursor("tasks/x", { afterSeq, logEpoch, untilEnd, reconnectTimeoutMs: undefined });
}

function snapshot(lastSeq: number, logEpoch = "a", state: TaskState = TaskState.RUNNING, firstSeq = 1, created = 1): WatchTaskResponse {
  const task = Task.fromPartial({ name: "tasks/x", lastSeq, state, createTime: new Date(created) });
  return { response: { $case: "snapshot", value: Snapshot.fromPartial({ task, logEpoch, firstSeq }) } };
}

function event(seq: number, payload?: Event["payload"]): WatchTaskResponse {
  return { response: { $case: "event", value: { ...Event.fromPartial({ seq }), payload } } };
}

test("a gap and a repeat are EventsLost", () => {
  for (const seq of [1, 3]) {
    const place = cursor();
    place.accept(snapshot(9));
    place.accept(event(1));
    assert.throws(() => place.accept(event(seq)), EventsLost);
  }
});

function events(seqs: number[], end = 0): WatchTaskResponse {
  const finished: Event["payload"] = {
    $case: "stateChange",
    value: { oldState: TaskState.RUNNING, newState: TaskState.COMPLETED, endReason: "END_REASON_FINISHED", message: "" },
  };
  const all = seqs.map((seq) => ({ ...Event.fromPartial({ seq }), payload: seq === end ? finished : undefined }));
  return { response: { $case: "events", value: { events: all } } };
}

test("events that come together are passed on one by one, and go on from there", () => {
  const place = cursor();
  place.accept(snapshot(9));
  const seqs = [...place.accept(events([1, 2, 3])), ...place.accept(event(4))].map((item) => item.type === "event" && item.event.seq);
  assert.deepEqual(seqs, [1, 2, 3, 4]);
  assert.equal(place.request().afterSeq, 4);
  assert.throws(() => place.accept(events([5, 7])), EventsLost);
});

test("a watch to the end ends within a batch", () => {
  const place = cursor(0, "", true);
  place.accept(snapshot(0));
  assert.equal(place.accept(events([1, 2, 3], 2)).length, 2);
  assert.equal(place.isDone, true);
});

test("a log that begins later is read from its beginning", () => {
  const place = cursor();
  place.accept(snapshot(9, "a", TaskState.RUNNING, 5));
  assert.equal(place.accept(event(5)).length, 1);
});

test("a log of another epoch that was watched is told as replaced, and read from its first event", () => {
  const place = cursor();
  place.accept(snapshot(9));
  place.accept(event(1));
  assert.deepEqual(place.request(), { name: "tasks/x", afterSeq: 1, logEpoch: "a", allowBatches: true });
  const replaced = place.lost(new OutOfRange("restored", { reason: "LOG_EPOCH_CHANGED" }));
  assert.deepEqual(replaced, { type: "logReplaced", afterSeq: 1 });
  assert.deepEqual(place.request(), { name: "tasks/x", afterSeq: 0, logEpoch: "", allowBatches: true });
  place.accept(snapshot(1, "b"));
  assert.equal(place.accept(event(1)).length, 1);
});

test("a task that was made again under its id is told as replaced, and read from its first event", () => {
  const place = cursor();
  place.accept(snapshot(2));
  place.accept(events([1, 2]));
  const another = snapshot(4, "a", TaskState.RUNNING, 1, 2);
  assert.throws(
    () => place.accept(another),
    (error: unknown) => {
      assert.ok(error instanceof OutOfRange);
      assert.deepEqual(place.lost(error), { type: "logReplaced", afterSeq: 2 });
      return true;
    },
  );
  assert.equal(place.request().afterSeq, 0);
  place.accept(another);
  assert.equal(place.accept(events([1, 2, 3, 4])).length, 4);
});

test("a place that was never good is an error", () => {
  assert.throws(() => cursor(7).lost(new OutOfRange("beyond", { reason: "SEQ_BEYOND_LAST" })), OutOfRange);
  assert.throws(() => cursor(7, "a").accept(snapshot(9, "b")), OutOfRange);
});

test("an outage is told once; one that looks like a fault of the daemon is a fault in the end", () => {
  const place = cursor();
  assert.equal(place.lost(new DaemonUnavailable("away"))?.type, "connectionLost");
  assert.equal(place.lost(new DaemonUnavailable("away")), undefined);
  const broken = new InternalError("stream reset");
  for (let i = 0; i < 4; i++) place.lost(broken);
  assert.throws(() => place.lost(broken), InternalError);
});

test("a watch to the end takes the end of an earlier run for history", () => {
  const end: Event["payload"] = {
    $case: "stateChange",
    value: { oldState: TaskState.RUNNING, newState: TaskState.COMPLETED, endReason: "END_REASON_FINISHED", message: "" },
  };
  const place = cursor(0, "", true);
  place.accept(snapshot(2));
  place.accept(event(1, end));
  place.accept(event(2));
  assert.equal(place.isDone, false);
  place.accept(event(3, end));
  assert.equal(place.isDone, true);
});

test("messages of a later daemon are passed over", () => {
  const place = cursor();
  assert.deepEqual(place.accept({ response: undefined }), []);
});
