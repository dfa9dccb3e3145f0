/** Signals of callers, who give one to as many calls as they like. */

/** What is to be done once a signal is aborted. With one listener for all, as Node warns of a leak at eleven. */
const waiting = new WeakMap<AbortSignal, { readonly actions: Set<() => void>; readonly listener: () => void }>();

/** Does it when the signal is aborted; returns what forgets it. */
export function onAbort(signal: AbortSignal | undefined, action: () => void): () => void {
  if (signal === undefined) return () => undefined;
  let entry = waiting.get(signal);
  if (entry === undefined) {
    const actions = new Set<() => void>();
    const listener = () => {
      for (const one of [...actions]) one();
    };
    entry = { actions, listener };
    waiting.set(signal, entry);
    signal.addEventListener("abort", listener, { once: true });
  }
  const { actions, listener } = entry;
  // An action of its own, should one function be given twice.
  const own = () => action();
  actions.add(own);
  return () => {
    actions.delete(own);
    if (actions.size > 0 || waiting.get(signal)?.listener !== listener) return;
    waiting.delete(signal);
    signal.removeEventListener("abort", listener);
  };
}

/** Waits; ends with the signal's reason where it is aborted. */
export function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason as Error);
    const timer = setTimeout(() => {
      forget();
      resolve();
    }, ms);
    const forget = onAbort(signal, () => {
      clearTimeout(timer);
      forget();
      reject(signal?.reason as Error);
    });
  });
}

/** The promise's answer, or the reason of the first of the signals that is aborted before. */
export function abortable<T>(promise: Promise<T>, ...signals: (AbortSignal | undefined)[]): Promise<T> {
  return new Promise((resolve, reject) => {
    const forgets: (() => void)[] = [];
    for (const signal of signals) {
      if (signal?.aborted) reject(signal.reason as Error);
      else forgets.push(onAbort(signal, () => reject(signal?.reason as Error)));
    }
    promise.then(resolve, reject).finally(() => forgets.forEach((forget) => forget()));
  });
}
