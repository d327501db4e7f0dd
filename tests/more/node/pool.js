// A pool of Node.js while pgsilo ends its sessions: `pool.js NAME`, made by the example of that name in
// docs/pools.md. The rule is that of tests/e2e/drivers/pools.py: a session that ends while it is idle is
// never seen by the application; one that ends in use gives its user one error, and the next checkout
// succeeds.
'use strict';

const assert = require('node:assert/strict');
const { readFileSync } = require('node:fs');
const { join } = require('node:path');
const { Client } = require('pg');
const { base, run, until } = require('./support');

const { PGSILO_ISSUER, PGSILO_LIFETIME, PGSILO_WORDS, PG_SUPERUSER_DSN } = process.env;
const SIZE = Number(process.env.PGSILO_POOL_SIZE);
const LOOPS = 2;
// Seconds: so long that a pool retires nothing in this test.
const FOR_EVER = 100_000;

// Knex puts the statement before the message.
function toldOfAnEnd({ severity, code, message }) {
  assert.deepEqual({ severity, code }, { severity: 'FATAL', code: '57P01' });
  assert.ok(message.endsWith(PGSILO_WORDS), message);
}

// How each is used, given what its example has made: an open transaction, as a function that runs SQL and
// answers with the first row.
const LIBRARIES = {
  'node-postgres': {
    makes: 'pool',
    transaction: async (pool, work) => {
      const client = await pool.connect();
      let failed;
      try {
        await client.query('BEGIN');
        await work(async (sql) => (await client.query(sql)).rows[0]);
        await client.query('COMMIT');
      } catch (error) {
        failed = error;
        throw error;
      } finally {
        client.release(failed);
      }
    },
    close: (pool) => pool.end(),
  },
  Knex: {
    makes: 'knex',
    transaction: (knex, work) => knex.transaction((open) => work(async (sql) => (await open.raw(sql)).rows[0])),
    close: (knex) => knex.destroy(),
  },
  Kysely: {
    makes: 'db',
    // It gives back a connection that has failed as if it had not, and may get it again.
    failsMoreThanOnceAtBegin: true,
    transaction: (db, work) => {
      const { sql } = require('kysely');
      return db.transaction().execute((open) => work(async (text) => (await sql.raw(text).execute(open)).rows[0]));
    },
    close: (db) => db.destroy(),
  },
  Drizzle: {
    makes: 'db',
    transaction: (db, work) => {
      const { sql } = require('drizzle-orm');
      return db.transaction((open) => work(async (text) => (await open.execute(sql.raw(text))).rows[0]));
    },
    close: (db) => db.$client.end(),
  },
};
const NAME = process.argv[2];
const LIBRARY = LIBRARIES[NAME];

// Called for each new connection.
let tokens = 0;
async function token() {
  tokens += 1;
  return (await fetch(PGSILO_ISSUER)).text();
}

// What the example makes, with the names that it takes for granted.
function made(report) {
  const page = readFileSync(join(__dirname, '../../../docs/pools.md'), 'utf8');
  const [, code] = page.match(new RegExp('```js\n// ' + NAME + '\n(.*?)```', 's'));
  const { password, ...server } = base;
  const names = { require, server, token, report, SIZE, LIFETIME: Number(PGSILO_LIFETIME ?? FOR_EVER) };
  return new Function(...Object.keys(names), `${code}\nreturn ${LIBRARY.makes};`)(...Object.values(names));
}

async function withPool(work) {
  // A listener of the pool and one of the client hear of the same error.
  const told = new Set();
  const watch = new Client({ connectionString: PG_SUPERUSER_DSN });
  const pool = made((error) => told.add(error));
  await watch.connect();
  await work({ pool, watch, told, ended: new Set() });
  await LIBRARY.close(pool);
  await watch.end();
  endings({ told }).forEach(toldOfAnEnd);
}

// With an SQLSTATE: a client may hear after it that its connection is closed.
const endings = ({ told }) => [...told].filter(({ code }) => code);

// Libraries wrap what the driver has told them.
const driverError = (error) => (error.cause ? driverError(error.cause) : error);

// A checkout always succeeds. Whether its session ended in use: with an error that an application
// knows, once for each session.
async function use(world, work) {
  let pid;
  try {
    await LIBRARY.transaction(world.pool, async (query) => {
      ({ pid } = await query('SELECT pg_backend_pid() AS pid'));
      try {
        await work(query, pid);
      } catch (error) {
        // It ran at the very end, which the next statement hears of.
        if (driverError(error).code !== '57014') throw error;
        await query('SELECT 1');
        assert.fail('cancelled, and its session lives on');
      }
    });
    return false;
  } catch (error) {
    const cause = driverError(error);
    // An end between two statements goes to the client's listener, and the next one has no SQLSTATE. With
    // Kysely and Drizzle none has: what the application gets is that the ROLLBACK failed.
    if (cause.code) toldOfAnEnd(cause);
    else assert.match(cause.message, /connection/i);
    assert.ok(!world.ended.has(pid), 'a session ended twice');
    // At its BEGIN it had not said yet which one it is.
    if (pid || !LIBRARY.failsMoreThanOnceAtBegin) world.ended.add(pid ?? cause);
    assert.ok(world.ended.size <= tokens, 'more ends than sessions');
    return true;
  }
}

async function shortTransaction(query) {
  await query('SELECT pg_sleep(0.002)');
  await query('SELECT 1');
}

// Has all connections of the pool in use at once, and works with each; their processes. No error
// is expected.
async function fill(world, work = async () => {}) {
  const pids = [];
  let allAreThere;
  const all = new Promise((resolve) => { allAreThere = resolve; });
  await Promise.all(Array.from({ length: SIZE }, () => LIBRARY.transaction(world.pool, async (query) => {
    pids.push((await query('SELECT pg_backend_pid() AS pid')).pid);
    await work(query);
    if (pids.length === SIZE) allAreThere();
    await all;
  })));
  assert.equal(new Set(pids).size, SIZE);
  return pids;
}

async function gone({ watch }, pids, what) {
  const query = 'SELECT count(*)::int AS left FROM pg_stat_activity WHERE pid = ANY($1)';
  await until(async () => (await watch.query(query, [pids])).rows[0].left === 0, what);
}

// Works until the processes are gone.
async function workWhile(world, pids, jobs) {
  let over = false;
  const loop = async () => {
    while (!over) await use(world, shortTransaction);
  };
  const wait = gone(world, pids, 'the first sessions to be gone').finally(() => { over = true; });
  await Promise.all([wait, ...jobs.map(async (job) => { await job(); await loop(); })]);
}

async function livesOnWhenItsSessionsEnd(world) {
  const idleInATransaction = async () => assert.ok(await use(world, async (query, pid) => {
    await gone(world, [pid], "a transaction's session to end");
    await query('SELECT 2');
  }));
  const inAQuery = async () => assert.ok(await use(world, (query) => query('SELECT pg_sleep(600)')));
  const first = await fill(world);
  await workWhile(world, first, [...Array(LOOPS).fill(async () => {}), idleInATransaction, inAQuery]);
  if (!LIBRARY.failsMoreThanOnceAtBegin) assert.ok(world.ended.size >= 2);
  let second;
  await until(async () => {
    second = await fill(world);
    return !second.some((pid) => first.includes(pid));
  }, 'the pool to have noticed all ends');
  const before = endings(world).length;
  await gone(world, second, 'the second sessions to end, all of them idle');
  await until(() => endings(world).length >= before + SIZE, 'the listeners to be told of each');
  const third = await fill(world, shortTransaction);
  assert.equal(new Set([...first, ...second, ...third]).size, 3 * SIZE);
  console.log(`sessions that ended in use: ${world.ended.size}`);
}

async function retiresItsConnectionsInTime(world) {
  const first = await fill(world);
  await workWhile(world, first, Array(SIZE).fill(async () => {}));
  assert.equal(world.ended.size + world.told.size, 0);
}

run({ pool: () => withPool(PGSILO_LIFETIME ? retiresItsConnectionsInTime : livesOnWhenItsSessionsEnd) });
