// Turns mask.js into mask.wasm: the JavaScript, an engine to run it, and the interface.

import { readFile, writeFile } from "node:fs/promises";
import { componentize } from "@bytecodealliance/componentize-js";

const { component } = await componentize(await readFile("mask.js", "utf8"), {
  witPath: "../../wit",
  worldName: "transform",
  // A transform has no network and no files; without these the module needs nothing from WASI.
  disableFeatures: ["clocks", "fetch-event", "http", "random", "stdio"],
});
await writeFile("mask.wasm", component);
