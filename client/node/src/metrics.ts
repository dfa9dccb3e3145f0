/** Curves of runs: what comes of GetMetrics. */

import type { GetMetricsResponse } from "./gen/finetuned/v1/task_service.js";

/** One curve of a run. The lists are of equal length, in ascending order of steps. */
export interface Series {
  /** Optimizer steps. */
  readonly steps: number[];
  /** Values at these steps; not a number and infinity are possible. */
  readonly values: number[];
  /** Passes over the training data at these steps, with fraction. */
  readonly epochs: number[];
  /** When they were measured, in seconds since 1970 (Unix time) with fraction. */
  readonly times: number[];
  /** Points that the run has; more than are here where the curve was thinned out. */
  pointCount: number;
}

/** The curves of one run, by name. */
export interface Metrics {
  /** Number of the run; 0 where the task has none yet. */
  run: number;
  /** Each value that was measured, such as `loss` or `eval_loss`. */
  readonly series: Record<string, Series>;
}

/** Adds a page, whose points go on where those of the page before ended. */
export function addPage(metrics: Metrics, page: GetMetricsResponse): void {
  metrics.run = page.run;
  for (const one of page.series) {
    const series = (metrics.series[one.metric] ??= { steps: [], values: [], epochs: [], times: [], pointCount: 0 });
    // Not push(...list): a page of 50,000 arguments is more than some stacks hold.
    for (const step of one.steps) series.steps.push(step);
    for (const value of one.values) series.values.push(value);
    for (const epoch of one.epochs) series.epochs.push(epoch);
    for (const time of one.times) series.times.push(time);
    series.pointCount = one.pointCount;
  }
}
