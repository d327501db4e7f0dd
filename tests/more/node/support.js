// What the scripts beside this one share: how to reach the proxy, and how checks are run.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');

const { PGSILO_HOST, PGSILO_PORT, PGSILO_TOKEN, PGSILO_CA } = process.env;
const base = { host: PGSILO_HOST, port: Number(PGSILO_PORT), user: 'app', password: PGSILO_TOKEN, database: 'acme' };
// Checked against the authority and, as the host is an address, against the certificate's own.
if (PGSILO_CA) base.ssl = { ca: fs.readFileSync(PGSILO_CA, 'utf8'), rejectUnauthorized: true };

async function until(ask, what) {
  const began = Date.now();
  while (!(await ask())) {
    assert.ok(Date.now() - began < 30000, 'waited in vain for ' + what);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

// Each check throws where something is wrong; the last line says that all have run.
function run(checks) {
  (async () => {
    const names = Object.keys(checks);
    for (const name of names) {
      const began = Date.now();
      await checks[name]();
      console.log(`ok ${name} (${Date.now() - began} ms)`);
    }
    console.log(`${names.length} of ${names.length} passed`);
  })().catch((error) => {
    console.error(error);
    process.exit(1);
  });
}

module.exports = { base, run, until };
