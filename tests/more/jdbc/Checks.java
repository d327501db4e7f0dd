// The PostgreSQL JDBC driver, unchanged, over verified TLS: run as `java Checks.java`.
// Each check throws where something is wrong; the last line says that all have run.

import java.io.StringReader;
import java.io.StringWriter;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyManager;

public final class Checks {
    interface Check {
        void run() throws Exception;
    }

    static final String HOST = System.getenv("PGSILO_HOST");
    static final String URL = "jdbc:postgresql://" + HOST + ":" + System.getenv("PGSILO_PORT") + "/";

    static Properties properties(String... changes) {
        Properties properties = new Properties();
        properties.setProperty("user", "app");
        properties.setProperty("password", System.getenv("PGSILO_TOKEN"));
        properties.setProperty("sslmode", "verify-full");
        properties.setProperty("sslrootcert", System.getenv("PGSILO_CA"));
        for (int n = 0; n < changes.length; n += 2) {
            properties.setProperty(changes[n], changes[n + 1]);
        }
        return properties;
    }

    static Connection connect(String... changes) throws SQLException {
        return DriverManager.getConnection(URL + "acme", properties(changes));
    }

    static String one(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getString(1);
        }
    }

    static void equal(Object expected, Object found) {
        if (!expected.equals(found)) {
            throw new AssertionError("expected " + expected + ", found " + found);
        }
    }

    static void fails(String sqlstate, Check check) throws Exception {
        try {
            check.run();
        } catch (SQLException error) {
            equal(sqlstate, error.getSQLState());
            return;
        }
        throw new AssertionError("no error " + sqlstate);
    }

    // `simple` sends simple queries only; the others prepare at the server after so many uses.
    static void queries(String mode, int threshold) throws Exception {
        try (Connection connection = connect("preferQueryMode", mode, "prepareThreshold", "" + threshold)) {
            equal("tenant_acme", one(connection, "SELECT current_database()"));
            try (Statement statement = connection.createStatement()) {
                statement.execute("CREATE TEMP TABLE t (n int8 PRIMARY KEY, s text, b bytea)");
            }
            try (PreparedStatement insert = connection.prepareStatement("INSERT INTO t VALUES (?, ?, decode(?, 'hex'))")) {
                for (int n = 0; n < 500; n += 1) {
                    insert.setLong(1, n);
                    insert.setString(2, "日本語 " + n);
                    insert.setString(3, "00ff");
                    insert.addBatch();
                }
                equal(500, Arrays.stream(insert.executeBatch()).sum());
            }
            try (PreparedStatement select = connection.prepareStatement("SELECT s, b FROM t WHERE n = ?")) {
                for (int n = 0; n < 20; n += 1) {
                    select.setLong(1, n);
                    try (ResultSet rows = select.executeQuery()) {
                        rows.next();
                        equal("日本語 " + n, rows.getString(1));
                        equal(2, rows.getBytes(2).length);
                    }
                }
            }
            fails("23505", () -> one(connection, "INSERT INTO t VALUES (1) RETURNING n"));
            connection.setAutoCommit(false);
            try (Statement statement = connection.createStatement()) {
                statement.setFetchSize(50);
                long sum = 0;
                try (ResultSet rows = statement.executeQuery("SELECT n FROM t")) {
                    while (rows.next()) {
                        sum += rows.getLong(1);
                    }
                }
                equal(124750L, sum);
            }
            connection.rollback();
            connection.setAutoCommit(true);
            equal(true, connection.isValid(30));
        }
    }

    static void copyBothWays() throws Exception {
        try (Connection connection = connect()) {
            CopyManager copy = connection.unwrap(PGConnection.class).getCopyAPI();
            connection.createStatement().execute("CREATE TEMP TABLE copied (n int, s text)");
            StringBuilder text = new StringBuilder();
            for (int n = 0; n < 100000; n += 1) {
                text.append(n).append("\trow ").append(n).append('\n');
            }
            equal(100000L, copy.copyIn("COPY copied FROM STDIN", new StringReader(text.toString())));
            StringWriter out = new StringWriter();
            equal(100000L, copy.copyOut("COPY (TABLE copied ORDER BY n) TO STDOUT", out));
            equal(text.toString(), out.toString());
            fails("22P02", () -> copy.copyIn("COPY copied FROM STDIN", new StringReader("x\ty\n")));
            equal("100000", one(connection, "SELECT count(*) FROM copied"));
        }
    }

    static void notifications() throws Exception {
        try (Connection listener = connect(); Connection sender = connect()) {
            listener.createStatement().execute("LISTEN news");
            sender.createStatement().execute("NOTIFY news, 'extra'");
            PGNotification[] heard = listener.unwrap(PGConnection.class).getNotifications(30000);
            equal("extra", heard[0].getParameter());
            equal(sender.unwrap(PGConnection.class).getBackendPID(), heard[0].getPID());
        }
    }

    static void cancel() throws Exception {
        try (Connection connection = connect(); Connection watcher = watcher()) {
            int pid = connection.unwrap(PGConnection.class).getBackendPID();
            for (int n = 0; n < 3; n += 1) {
                Statement statement = connection.createStatement();
                CompletableFuture<Void> cancelled = CompletableFuture.runAsync(() -> {
                    try {
                        fails("57014", () -> statement.execute("SELECT pg_sleep(60)"));
                    } catch (Exception error) {
                        throw new RuntimeException(error);
                    }
                });
                String sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid = " + pid;
                long began = System.nanoTime();
                while (!one(watcher, sleeps).equals("1")) {
                    equal(true, System.nanoTime() - began < 30_000_000_000L);
                    Thread.sleep(10);
                }
                statement.cancel();
                cancelled.get(30, TimeUnit.SECONDS);
                equal("" + n, one(connection, "SELECT " + n));
            }
        }
    }

    // A superuser beside the proxy: a tenant's session does not see what the others are doing.
    static Connection watcher() throws SQLException {
        java.net.URI dsn = java.net.URI.create(System.getenv("PG_SUPERUSER_DSN"));
        String[] login = dsn.getUserInfo().split(":");
        return DriverManager.getConnection("jdbc:postgresql://" + dsn.getAuthority().split("@")[1] + dsn.getPath(), login[0], login[1]);
    }

    static void queryTimeout() throws Exception {
        try (Connection connection = connect(); Statement statement = connection.createStatement()) {
            statement.setQueryTimeout(1);
            fails("57014", () -> statement.execute("SELECT pg_sleep(60)"));
            equal("1", one(connection, "SELECT 1"));
        }
    }

    static void largeValues() throws Exception {
        byte[] value = new byte[32 << 20];
        Arrays.fill(value, (byte) 7);
        try (Connection connection = connect(); PreparedStatement echo = connection.prepareStatement("SELECT ?")) {
            echo.setBytes(1, value);
            try (ResultSet rows = echo.executeQuery()) {
                rows.next();
                equal(true, Arrays.equals(value, rows.getBytes(1)));
            }
        }
    }

    static void refusals() throws Exception {
        fails("28P01", () -> connect("password", "no token"));
        fails("3D000", () -> DriverManager.getConnection(URL + "globex", properties()));
        fails("28000", () -> connect("sslmode", "disable"));
        connect("sslmode", "require").close();
        connect("sslmode", "verify-ca").close();
        connect("sslmode", "prefer").close();
    }

    public static void main(String[] arguments) throws Exception {
        Map<String, Check> checks = new LinkedHashMap<>();
        checks.put("simple", () -> queries("simple", 5));
        checks.put("extended", () -> queries("extended", 5));
        checks.put("extendedForPrepared", () -> queries("extendedForPrepared", 5));
        checks.put("extendedCacheEverything", () -> queries("extendedCacheEverything", 1));
        checks.put("neverPrepared", () -> queries("extended", 0));
        checks.put("preparedAtOnceAndBinary", () -> queries("extended", -1));
        checks.put("copyBothWays", Checks::copyBothWays);
        checks.put("notifications", Checks::notifications);
        checks.put("cancel", Checks::cancel);
        checks.put("queryTimeout", Checks::queryTimeout);
        checks.put("largeValues", Checks::largeValues);
        checks.put("refusals", Checks::refusals);
        for (Map.Entry<String, Check> check : checks.entrySet()) {
            long began = System.nanoTime();
            check.getValue().run();
            System.out.printf("ok %s (%d ms)%n", check.getKey(), (System.nanoTime() - began) / 1_000_000);
        }
        System.out.printf("%d of %d passed%n", checks.size(), checks.size());
        System.exit(0);
    }
}
