// An OpenID provider on loopback, over HTTPS: `issuer.js FOLDER PORT KID...`. FOLDER holds its certificate, and
// its keys as KID.jwk, which are made if they are not there; the first one signs.
'use strict';

const { generateKeyPairSync } = require('node:crypto');
const { existsSync, readFileSync, writeFileSync } = require('node:fs');
const https = require('node:https');
const { join } = require('node:path');
const { pathToFileURL } = require('node:url');

const [folder, port, ...kids] = process.argv.slice(2);
const issuer = `https://127.0.0.1:${port}`;
// The tenants of its clients; `nobody` has none.
const TENANTS = { orders: 'acme', billing: 'globex' };
const SECRET = 'for-tests-on-loopback-only';

function key(kid) {
  const path = join(folder, `${kid}.jwk`);
  if (!existsSync(path)) {
    const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const jwk = { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg: 'ES256' };
    writeFileSync(path, JSON.stringify(jwk), { mode: 0o600 });
  }
  return JSON.parse(readFileSync(path, 'utf8'));
}

// A client that speaks for itself, as a service does.
const client = (id) => ({
  client_id: id,
  client_secret: SECRET,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
  id_token_signed_response_alg: 'ES256',
});

async function main() {
  // `import` does not look where NODE_PATH says.
  const { Provider } = await import(pathToFileURL(require.resolve('oidc-provider')));
  const provider = new Provider(issuer, {
    clients: [...Object.keys(TENANTS), 'nobody'].map(client),
    jwks: { keys: kids.map(key) },
    extraTokenClaims: (_context, token) => ({ tenant: TENANTS[token.clientId] }),
    ttl: { ClientCredentials: 600 },
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        // Every resource is one: RFC 9068's tokens for it, of which it is the audience.
        getResourceServerInfo: (_context, resource) => ({
          scope: '',
          audience: resource,
          accessTokenFormat: 'jwt',
          accessTokenTTL: 600,
          jwt: { sign: { alg: 'ES256' } },
        }),
      },
    },
  });
  const tls = { cert: readFileSync(join(folder, 'server.crt')), key: readFileSync(join(folder, 'server.key')) };
  https.createServer(tls, provider.callback()).listen(Number(port), '127.0.0.1');
}

main();
