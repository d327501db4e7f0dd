// node-postgres' Pool while pgsilo ends its sessions. The rule is that of tests/e2e/drivers/pools.py:
// a session that ends while it is idle is never seen by the application; one that ends in use gives
// its user one error, and the next checkout succeeds.
'use strict';

const assert = require('node:assert/strict');
const { Client, Pool } = require('pg');
const { base, run, until } = require('./support');

const { PGSILO_ISSUER, PGSILO_LIFETIME, PGSILO_WORDS, PG_SUPERUSER_DSN } = process.env;
const SIZE = Number(process.env.PGSILO_POOL_SIZE);
const LOOPS = 2;
const END = { severity: 'FATAL', code: '57P01', message: PGSILO_WORDS };

const toldOfAnEnd = ({ severity, code, message }) => assert.deepEqual({ severity, code, message }, END);

async function withPool(work) {
  const pool = new Pool({
    ...base,
    max: SIZE,
    idleTimeoutMillis: 0,
    maxLifetimeSeconds: Number(PGSILO_LIFETIME ?? 0),
    // Called for each new connection.
    password: async () => (await fetch(PGSILO_ISSUER)).text(),
  });
  const watch = new Client({ connectionString: PG_SUPERUSER_DSN });
  // Without this listener the end of an idle session is the end of the process.
  const idle = [];
  pool.on('error', (error) => idle.push(error));
  await watch.connect();
  await work({ pool, watch, idle, ended: new Set() });
  await pool.end();
  await watch.end();
  idle.forEach(toldOfAnEnd);
}

// Without a listener of its own, the end of a client that is checked out is the end of the process
// if it comes between two queries.
async function checkOut({ pool }) {
  const client = await pool.connect();
  const held = { client };
  const listen = (error) => { held.told ??= error; };
  client.on('error', listen);
  held.giveBack = (failed) => {
    client.removeListener('error', listen);
    client.release(failed ?? held.told);
  };
  return held;
}

// A checkout always succeeds. Whether its session ended in use: with an error that an application
// knows, once for each session.
async function use(world, work) {
  const held = await checkOut(world);
  const { client } = held;
  let failed;
  try {
    await client.query('BEGIN');
    await work(client);
    await client.query('COMMIT');
  } catch (error) {
    failed = error;
    // It ran at the very end, which the next statement hears of.
    if (error.code === '57014') failed = await client.query('SELECT 1').then(() => error, (next) => next);
    toldOfAnEnd(held.told ?? failed);
    assert.ok(!world.ended.has(client.processID), 'a session ended twice');
    world.ended.add(client.processID);
  }
  held.giveBack(failed);
  return failed !== undefined;
}

async function shortTransaction(client) {
  await client.query('SELECT pg_sleep(0.002)');
  await client.query('SELECT 1');
}

// Checks out all connections of the pool at once, and works with each; their processes. No error
// is expected.
async function fill(world, work = async () => {}) {
  const all = await Promise.all(Array.from({ length: SIZE }, async () => {
    const held = await checkOut(world);
    await work(held.client);
    return held;
  }));
  all.forEach((held) => held.giveBack());
  const pids = all.map(({ client }) => client.processID);
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
  const idleInATransaction = async () => assert.ok(await use(world, async (client) => {
    await client.query('SELECT 1');
    await gone(world, [client.processID], "a transaction's session to end");
    await client.query('SELECT 2');
  }));
  const inAQuery = async () => assert.ok(await use(world, (client) => client.query('SELECT pg_sleep(600)')));
  const first = await fill(world);
  await workWhile(world, first, [...Array(LOOPS).fill(async () => {}), idleInATransaction, inAQuery]);
  assert.ok(world.ended.size >= 2);
  let second;
  await until(async () => {
    second = await fill(world);
    return !second.some((pid) => first.includes(pid));
  }, 'the pool to have noticed all ends');
  await gone(world, second, 'the second sessions to end, all of them idle');
  await until(() => world.pool.totalCount === 0, 'the pool to notice');
  assert.ok(world.idle.length >= SIZE);
  const third = await fill(world, shortTransaction);
  assert.equal(new Set([...first, ...second, ...third]).size, 3 * SIZE);
  console.log(`sessions that ended in use: ${world.ended.size}`);
}

async function retiresItsConnectionsInTime(world) {
  const first = await fill(world);
  await workWhile(world, first, Array(SIZE).fill(async () => {}));
  assert.equal(world.ended.size + world.idle.length, 0);
}

run({ pool: () => withPool(PGSILO_LIFETIME ? retiresItsConnectionsInTime : livesOnWhenItsSessionsEnd) });
