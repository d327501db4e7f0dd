// node-postgres, unchanged: simple and prepared queries, a pool, cursors, COPY, LISTEN, cancel.
'use strict';

const assert = require('node:assert/strict');
const { pipeline } = require('node:stream/promises');
const { Readable, Writable } = require('node:stream');
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');
const { from: copyFrom, to: copyTo } = require('pg-copy-streams');
const { base, run, until } = require('./support');

const { PGSILO_CA, PG_SUPERUSER_DSN } = process.env;

async function withClient(work, changes = {}) {
  const client = new Client({ ...base, ...changes });
  await client.connect();
  try {
    return await work(client);
  } finally {
    await client.end();
  }
}

const one = async (client, ...query) => Object.values((await client.query(...query)).rows[0])[0];

const checks = {
  simpleAndExtendedQueries: () => withClient(async (client) => {
    assert.equal(await one(client, 'SELECT current_database()'), 'tenant_acme');
    assert.equal(await one(client, 'SELECT pg_backend_pid()'), client.processID);
    assert.equal(await one(client, 'SHOW application_name'), 'node');
    const several = await client.query('SELECT 1 AS n; SELECT 2 AS n');
    assert.deepEqual(several.map((result) => result.rows[0].n), [1, 2]);
    const values = [7, '日本語', Buffer.from([0, 255]), [1, 2], { a: 1 }, null];
    const result = await client.query('SELECT $1::int a, $2::text b, $3::bytea c, $4::int[] d, $5::jsonb e, $6::text f', values);
    assert.deepEqual(Object.values(result.rows[0]), values);
    const binary = await client.query({ text: 'SELECT $1::int AS n', values: [5], binary: true });
    assert.equal(binary.rows[0].n, 5);
    await assert.rejects(client.query('SELECT 1/0'), { code: '22012' });
    const notice = new Promise((resolve) => client.once('notice', resolve));
    await client.query("DO $$BEGIN RAISE NOTICE 'psst'; END$$");
    assert.equal((await notice).message, 'psst');
  }, { application_name: 'node' }),

  namedPreparedStatements: () => withClient(async (client) => {
    for (let n = 0; n < 100; n += 1) {
      const query = { name: 'add', text: 'SELECT $1::int + 1 AS n', values: [n] };
      assert.equal(await one(client, query), n + 1);
    }
    assert.equal(await one(client, 'SELECT count(*)::int FROM pg_prepared_statements'), 1);
    const queued = Array.from({ length: 200 }, (_, n) => one(client, 'SELECT $1::int', [n]));
    assert.deepEqual(await Promise.all(queued), Array.from({ length: 200 }, (_, n) => n));
  }),

  transactions: () => withClient(async (client) => {
    await client.query('CREATE TEMP TABLE one (n int PRIMARY KEY)');
    await client.query('BEGIN');
    await client.query('INSERT INTO one VALUES (1)');
    await assert.rejects(client.query('INSERT INTO one VALUES (1)'), { code: '23505', constraint: 'one_pkey' });
    await assert.rejects(client.query('SELECT 1'), { code: '25P02' });
    await client.query('ROLLBACK');
    assert.equal(await one(client, 'SELECT count(*)::int FROM one'), 0);
  }),

  pool: async () => {
    const pool = new Pool({ ...base, max: 5 });
    const all = Array.from({ length: 100 }, (_, n) => one(pool, 'SELECT $1::int', [n]));
    assert.deepEqual(await Promise.all(all), Array.from({ length: 100 }, (_, n) => n));
    assert.ok(pool.totalCount <= 5);
    await pool.end();
  },

  cursors: () => withClient(async (client) => {
    const cursor = client.query(new Cursor('SELECT generate_series(1, $1::int) AS n', [1000]));
    let sum = 0;
    for (let rows = await cursor.read(100); rows.length > 0; rows = await cursor.read(100)) {
      rows.forEach((row) => { sum += row.n; });
    }
    assert.equal(sum, 500500);
    await cursor.close();
    assert.equal(await one(client, 'SELECT 1'), 1);
  }),

  copyBothWays: () => withClient(async (client) => {
    await client.query('CREATE TEMP TABLE copied (n int, t text)');
    const lines = function* () { for (let n = 0; n < 100000; n += 1) yield `${n}\trow ${n}\n`; };
    await pipeline(Readable.from(lines()), client.query(copyFrom('COPY copied FROM STDIN')));
    assert.equal(await one(client, "SELECT count(*) || '/' || sum(n) FROM copied"), '100000/4999950000');
    let copied = 0;
    const count = new Writable({ write(chunk, _, done) { for (const byte of chunk) copied += byte === 10; done(); } });
    await pipeline(client.query(copyTo('COPY copied TO STDOUT')), count);
    assert.equal(copied, 100000);
    await assert.rejects(pipeline(Readable.from(['x\ty\n']), client.query(copyFrom('COPY copied FROM STDIN'))), { code: '22P02' });
    assert.equal(await one(client, 'SELECT 1'), 1);
  }),

  notifications: () => withClient((listener) => withClient(async (sender) => {
    const heard = new Promise((resolve) => listener.once('notification', resolve));
    await listener.query('LISTEN news');
    await sender.query("NOTIFY news, 'extra'");
    const { channel, payload, processId } = await heard;
    assert.deepEqual([channel, payload, processId], ['news', 'extra', sender.processID]);
  })),

  cancel: () => withClient(async (client) => {
    const watcher = new Client({ connectionString: PG_SUPERUSER_DSN });
    await watcher.connect();
    for (let n = 0; n < 3; n += 1) {
      const query = new (require('pg').Query)('SELECT pg_sleep(60)');
      const failed = new Promise((resolve) => { query.once('error', resolve); });
      client.query(query);
      const sleeps = "SELECT count(*)::int FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
      await until(async () => (await one(watcher, sleeps, [client.processID])) === 1, 'the query to run');
      // The request goes over a connection of its own, in clear even before it asks for TLS.
      new Client(base).cancel(client, query);
      assert.equal((await failed).code, '57014');
      assert.equal(await one(client, 'SELECT $1::int', [n]), n);
    }
    await watcher.end();
  }),

  largeValues: () => withClient(async (client) => {
    const value = Buffer.alloc(32 << 20, 'pgsilo');
    assert.ok((await one(client, 'SELECT $1::bytea', [value])).equals(value));
  }),

  refusals: async () => {
    await assert.rejects(withClient(() => {}, { password: 'no token' }), { code: '28P01' });
    await assert.rejects(withClient(() => {}, { database: 'globex' }), { code: '3D000' });
    if (PGSILO_CA) {
      await assert.rejects(withClient(() => {}, { ssl: false }), { code: '28000', message: 'TLS is required' });
      await assert.rejects(withClient(() => {}, { ssl: { rejectUnauthorized: true } }), /certificate/);
    }
  },
};

run(checks);
