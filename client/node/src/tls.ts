/** TLS: what a client trusts, and what it shows of itself. */

import * as fs from "node:fs";

import { InvalidArgument } from "./errors.js";

const CA_VARIABLE = "FINETUNED_TLS_CA";
const CERTIFICATE_VARIABLE = "FINETUNED_TLS_CERT";
const KEY_VARIABLE = "FINETUNED_TLS_KEY";

/** PEM files for a connection with TLS. */
export interface TLS {
  /** The CA that the daemon's certificate must come from, or that certificate itself where it is self-signed. Absent: the CAs that Node brings. */
  ca?: string | undefined;
  /** The client's own certificate, where the daemon demands one (`--tls-client-ca`). */
  certificate?: string | undefined;
  /** Its private key. */
  key?: string | undefined;
}

/** What the files hold. Another content is another endpoint, and gets a new channel. */
export interface TLSContent {
  readonly ca: Buffer | undefined;
  readonly certificate: Buffer | undefined;
  readonly key: Buffer | undefined;
}

/** The content of the files that were given, else of those that the environment names; undefined: there is to be no TLS. */
export function readTLS(tls: TLS | undefined): TLSContent | undefined {
  let files = tls;
  if (files === undefined) {
    files = {
      ca: process.env[CA_VARIABLE] || undefined,
      certificate: process.env[CERTIFICATE_VARIABLE] || undefined,
      key: process.env[KEY_VARIABLE] || undefined,
    };
    if (!files.ca && !files.certificate && !files.key) return undefined;
  }
  if ((files.certificate === undefined) !== (files.key === undefined)) {
    throw new InvalidArgument(
      `the client's certificate and its key go together (${CERTIFICATE_VARIABLE}, ${KEY_VARIABLE})`,
      { reason: "BAD_TLS" },
    );
  }
  return {
    ca: read(files.ca, "CERTIFICATE"),
    certificate: read(files.certificate, "CERTIFICATE"),
    key: read(files.key, "PRIVATE KEY"),
  };
}

function read(file: string | undefined, kind: string): Buffer | undefined {
  if (file === undefined) return undefined;
  let content: Buffer;
  try {
    content = fs.readFileSync(file);
  } catch (error) {
    throw new InvalidArgument(`${file} can't be read: ${(error as Error).message}`, { reason: "BAD_TLS", cause: error });
  }
  if (!content.includes(`${kind}-----`)) {
    throw new InvalidArgument(`${file} holds no ${kind.toLowerCase()} in PEM`, { reason: "BAD_TLS" });
  }
  return content;
}

// What Node's text of a failed handshake has in it: what that means, and what to do.
const TROUBLES: readonly (readonly [RegExp, string])[] = [
  [
    /altnames|does not match certificate/i,
    "its certificate is for another name than the one that was dialled; use a name or address that the certificate holds, " +
      "or have one made that holds this one",
  ],
  [/certificate has expired/i, "its certificate has expired; a new one in place of the file is taken without a restart"],
  [
    /self.signed certificate|unable to (verify|get)|certificate verify failed/i,
    `its certificate does not come from the CA that you trust; give the right one by ${CA_VARIABLE} or \`tls\``,
  ],
  [
    /wrong version number|packet length too long/i,
    `it does not speak TLS at that address; take away ${CA_VARIABLE}, or let the daemon serve with --tls-cert`,
  ],
  [
    /certificate required|handshake failure|alert/i,
    `the TLS handshake failed; if the daemon was started with --tls-client-ca, show a certificate of its CA: ` +
      `${CERTIFICATE_VARIABLE}, ${KEY_VARIABLE}`,
  ],
];

/** Why no connection came about, and the next step; empty: it is not for TLS. */
export function explainTLS(content: TLSContent | undefined, message: string): string {
  if (content === undefined) return "";
  return TROUBLES.find(([sign]) => sign.test(message))?.[1] ?? "";
}

/** What else may be wrong where somebody takes the connection and closes it. */
export function adviseTLS(content: TLSContent | undefined): string {
  if (content === undefined) return `if the daemon serves with --tls-cert, name its CA by ${CA_VARIABLE}`;
  if (content.certificate === undefined) {
    return `if the daemon was started with --tls-client-ca, show a certificate: ${CERTIFICATE_VARIABLE}, ${KEY_VARIABLE}`;
  }
  return "the certificate of this client may come from another CA than the daemon demands";
}

/** What to name in a sentence that asks for TLS. */
export const TLS_HINT = CA_VARIABLE;
