/** As much of Electron as the sketch uses, so that it is type-checked without installing Electron. Leave it out of your application. */
declare module "electron" {
  export interface WebContents {
    isDestroyed(): boolean;
    once(event: "destroyed", listener: () => void): void;
    send(channel: string, ...values: unknown[]): void;
  }
  export const app: {
    whenReady(): Promise<void>;
    on(event: "will-quit" | "window-all-closed", listener: () => void): void;
    quit(): void;
  };
  export class BrowserWindow {
    constructor(options: { webPreferences: { preload: string } });
    loadFile(file: string): Promise<void>;
  }
  export const ipcMain: {
    handle(channel: string, listener: (event: { sender: WebContents }, ...values: never[]) => unknown): void;
  };
  export const ipcRenderer: {
    invoke(channel: string, ...values: unknown[]): Promise<unknown>;
    on(channel: string, listener: (event: unknown, ...values: never[]) => void): void;
    removeListener(channel: string, listener: (event: unknown, ...values: never[]) => void): void;
  };
  export const contextBridge: { exposeInMainWorld(name: string, api: Record<string, unknown>): void };
}
