/** Electron's preload script: what a window may ask for. */

import type { ErrorObject, ParametersInput, WatchItem } from "@finetuned/client";
import { contextBridge, ipcRenderer } from "electron";

/** What a window hears of a task: the items of a watch with errors as plain objects, and `failed` where the watch ended. */
export type Told =
  | Exclude<WatchItem, { type: "connectionLost" }>
  | { type: "connectionLost"; error: ErrorObject; afterSeq: number }
  | { type: "failed"; error: ErrorObject };

let watches = 0;

contextBridge.exposeInMainWorld("finetuned", {
  train: (parameters: ParametersInput) => ipcRenderer.invoke("train", parameters),
  stop: (task: string) => ipcRenderer.invoke("stop", task),
  /** Calls back with all that happens to a task; returns what ends it. */
  watch(task: string, take: (item: Told) => void): () => void {
    const id = `finetuned:watch:${(watches += 1)}`;
    const listener = (_event: unknown, item: Told) => take(item);
    ipcRenderer.on(id, listener);
    void ipcRenderer.invoke("watch", id, task);
    return () => {
      ipcRenderer.removeListener(id, listener);
      void ipcRenderer.invoke("unwatch", id);
    };
  },
});
