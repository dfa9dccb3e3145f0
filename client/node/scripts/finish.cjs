// After tsc: the door for `import`, to the very same classes as for `require`, so that `instanceof` holds across both; and the
// project's license, which npm packs where it lies here.
"use strict";

const fs = require("node:fs");
const path = require("node:path");

const here = path.dirname(__dirname);
const dist = path.join(here, "dist");
const names = Object.keys(require(path.join(dist, "index.js"))).sort();
fs.writeFileSync(
  path.join(dist, "index.mjs"),
  `import client from "./index.js";\n\nexport const {\n${names.map((name) => `  ${name},\n`).join("")}} = client;\n`,
);
fs.writeFileSync(path.join(dist, "index.d.mts"), 'export * from "./index.js";\n');
fs.copyFileSync(path.join(here, "../../LICENSE"), path.join(here, "LICENSE"));
