/** Which checkpoint a run goes on from. */

import { ResumeChoice } from "./gen/finetuned/v1/task.js";

/** The choice that `newest` or `best` is; else unspecified, and the folder. */
export function resumeChoice(resume: string | undefined): { resume: ResumeChoice; resumePath: string } {
  switch (resume) {
    case "newest":
      return { resume: ResumeChoice.NEWEST_CHECKPOINT, resumePath: "" };
    case "best":
      return { resume: ResumeChoice.BEST_CHECKPOINT, resumePath: "" };
    default:
      return { resume: ResumeChoice.UNSPECIFIED, resumePath: resume ?? "" };
  }
}
