// Every way in which node-postgres can prove who it is, beside a password.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
const { Client } = require('pg');

const { env } = process;
const shown = {
  ca: fs.readFileSync(env.PGSILO_CA, 'utf8'),
  cert: fs.readFileSync(env.CLIENT_CERTIFICATE, 'utf8'),
  key: fs.readFileSync(env.CLIENT_KEY, 'utf8'),
  rejectUnauthorized: true,
};

async function lands(how) {
  const client = new Client({ host: '127.0.0.1', user: 'app', database: 'acme', ...how });
  await client.connect();
  const { rows } = await client.query('SELECT current_database() AS name');
  assert.equal(rows[0].name, 'tenant_acme');
  await client.end();
}

const ways = {
  byItsCertificate: () => lands({ port: Number(env.CERTIFICATE_PORT), ssl: shown }),
  withATokenBoundToItsCertificate: () => lands({
    port: Number(env.BOUND_PORT), ssl: shown, password: env.BOUND_TOKEN,
  }),
  withABoundTokenAndNoCertificateIsRefused: () => assert.rejects(
    lands({ port: Number(env.BOUND_PORT), ssl: { ca: shown.ca }, password: env.BOUND_TOKEN }),
    { code: '28P01' },
  ),
  throughASidecar: async () => {
    await lands({ port: Number(env.SIDECAR_PORT) });
    await lands({ host: env.SIDECAR_DIR, port: 6432 });
  },
};

(async () => {
  for (const [name, way] of Object.entries(ways)) {
    await way();
    console.log(name);
  }
  const count = Object.keys(ways).length;
  console.log(`${count} of ${count} passed`);
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
