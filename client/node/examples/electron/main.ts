/** Electron's main process: one client for all windows. Windows hear by IPC, and get plain objects. */

import * as path from "node:path";

import { Client, type ErrorObject, FinetunedError, type ParametersInput } from "@finetuned/client";
import { app, BrowserWindow, ipcMain, type WebContents } from "electron";

import type { Told } from "./preload.js";

// A desktop gives its programs a short path, on which no `finetuned` may lie: name the one that you ship or have found.
const program = process.env["MY_FINETUNED"];
const client = new Client({ startDaemon: program ? [program] : true });

/** IPC keeps nothing but the message of an `Error`: so an error is an answer too, with its violations. */
async function answer<T>(made: Promise<T>): Promise<{ value: T } | { error: ErrorObject }> {
  try {
    return { value: await made };
  } catch (error) {
    if (error instanceof FinetunedError) return { error: error.toJSON() };
    throw error;
  }
}

/** Sends a window all that happens to a task, until the window asks for no more or is gone. */
async function watch(window: WebContents, id: string, task: string, signal: AbortSignal): Promise<void> {
  const tell = (item: Told) => {
    if (!window.isDestroyed()) window.send(id, item);
  };
  try {
    for await (const item of client.watchTask(task, { signal })) {
      tell(item.type === "connectionLost" ? { ...item, error: item.error.toJSON() } : item);
    }
  } catch (error) {
    if (error instanceof FinetunedError) tell({ type: "failed", error: error.toJSON() });
  }
}

const watches = new Map<string, AbortController>();

ipcMain.handle("train", (_event, parameters: ParametersInput) =>
  answer(client.createTask("sft", parameters, { start: true })),
);
ipcMain.handle("stop", (_event, task: string) => answer(client.stopTask(task)));
ipcMain.handle("watch", ({ sender }, id: string, task: string) => {
  const stop = new AbortController();
  watches.set(id, stop);
  sender.once("destroyed", () => stop.abort());
  void watch(sender, id, task, stop.signal).finally(() => watches.delete(id));
});
ipcMain.handle("unwatch", (_event, id: string) => watches.get(id)?.abort());

void app.whenReady().then(() => {
  const window = new BrowserWindow({ webPreferences: { preload: path.join(__dirname, "preload.js") } });
  return window.loadFile("index.html");
});
app.on("window-all-closed", () => app.quit());
// The daemon and its runs go on.
app.on("will-quit", () => client.close());
