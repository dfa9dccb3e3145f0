/** The language of the daemon's sentences. */

import { refuse } from "./errors.js";
import { shown } from "./words.js";

/** A language that the daemon speaks. */
export type Language = "en" | "zh";

/** Metadata of a call: the language of the answer. */
export const LANGUAGE_KEY = "accept-language";

/** `en` or `zh`; where nothing is wished for, what the locale's variables say, else `en`. */
export function languageOf(wish: string | undefined): Language {
  if (wish === undefined) {
    const { LC_ALL, LC_MESSAGES, LANG } = process.env;
    const locale = LC_ALL || LC_MESSAGES || LANG || "";
    return locale.toLowerCase().startsWith("zh") ? "zh" : "en";
  }
  if (wish === "en" || wish === "zh") return wish;
  return refuse([{ field: "language", description: `must be en or zh, not ${shown(wish)}`, reason: "NOT_A_CHOICE" }]);
}
