/**
 * Trains a model and shows its loss.
 *
 *     npx tsx examples/train.ts chats.jsonl ~/models/small out
 */

import { Client, InvalidArgument } from "@finetuned/client";

async function main([trainFile, modelPath, outputDir]: string[]): Promise<void> {
  const client = new Client({ startDaemon: true });
  try {
    const task = await client.train("sft", {
      data: { trainFile, modelPath, outputDir },
      training: { maxSteps: 200, learningRate: 1e-4 },
    });
    console.log(`${task.task.displayName} goes on whatever becomes of this program`);
    for await (const item of task.watch()) {
      if (item.type === "connectionLost") console.log("the daemon is away; the run goes on");
      if (item.type !== "event" || item.event.payload?.$case !== "progress") continue;
      const { step, totalSteps, loss } = item.event.payload.value;
      console.log(`${step}/${totalSteps} loss ${loss?.toFixed(4)}`);
    }
    console.log(`${task.stateName}: ${task.task.endMessage}`);
    process.exitCode = task.stateName === "completed" ? 0 : 1;
  } catch (error) {
    if (!(error instanceof InvalidArgument)) throw error;
    for (const { field, description } of error.violations) console.error(`${field}  ${description}`);
    process.exitCode = 2;
  } finally {
    client.close();
  }
}

void main(process.argv.slice(2));
