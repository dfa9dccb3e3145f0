// After tsc: the door for `import`, to the very same classes as for `require`, so that `instanceof` holds across both.
"use strict";

const fs = require("node:fs");
const path = require("node:path");

const dist = path.join(path.dirname(__dirname), "dist");
const names = Object.keys(require(path.join(dist, "index.js"))).sort();
fs.writeFileSync(
  path.join(dist, "index.mjs"),
  `import client from "./index.js";\n\nexport const {\n${names.map((name) => `  ${name},\n`).join("")}} = client;\n`,
);
fs.writeFileSync(path.join(dist, "index.d.mts"), 'export * from "./index.js";\n');
