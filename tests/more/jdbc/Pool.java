// HikariCP over the PostgreSQL JDBC driver while pgsilo ends its sessions: run as `java Pool.java`.
// The rule is that of tests/e2e/drivers/pools.py: a session that ends while it is idle is never
// seen by the application; one that ends in use gives its user one error, and the next checkout
// succeeds. The last line says that all has run.

import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.ds.PGSimpleDataSource;
import org.postgresql.util.PSQLException;

public final class Pool {
    interface Work {
        void with(Connection connection) throws Exception;
    }

    interface Job {
        void run() throws Exception;
    }

    static final int SIZE = Integer.parseInt(System.getenv("PGSILO_POOL_SIZE"));
    static final int LOOPS = 2;
    static final String WORDS = System.getenv("PGSILO_WORDS");
    static final String LIFETIME = System.getenv("PGSILO_LIFETIME");

    // Asks for a fresh token for each new connection.
    static final class WithFreshToken extends PGSimpleDataSource {
        @Override
        public Connection getConnection() throws SQLException {
            try {
                HttpRequest request = HttpRequest.newBuilder(URI.create(System.getenv("PGSILO_ISSUER"))).build();
                String token = HttpClient.newHttpClient().send(request, BodyHandlers.ofString()).body();
                return getConnection("app", token);
            } catch (java.io.IOException | InterruptedException error) {
                throw new SQLException(error);
            }
        }
    }

    static HikariDataSource pool() {
        WithFreshToken source = new WithFreshToken();
        source.setServerNames(new String[] {System.getenv("PGSILO_HOST")});
        source.setPortNumbers(new int[] {Integer.parseInt(System.getenv("PGSILO_PORT"))});
        source.setDatabaseName("acme");
        source.setSslmode("verify-full");
        source.setSslRootCert(System.getenv("PGSILO_CA"));
        HikariConfig config = new HikariConfig();
        config.setDataSource(source);
        config.setMaximumPoolSize(SIZE);
        config.setAutoCommit(false);
        if (LIFETIME != null) {
            config.setMaxLifetime(TimeUnit.SECONDS.toMillis(Long.parseLong(LIFETIME)));
        }
        return new HikariDataSource(config);
    }

    static {
        // Otherwise it hands out unchecked what was used within the last 500 ms.
        System.setProperty("com.zaxxer.hikari.aliveBypassWindowMs", "-1");
    }

    static final HikariDataSource POOL = pool();
    static final Set<Integer> ENDED = ConcurrentHashMap.newKeySet();
    static volatile boolean over;

    static void check(boolean holds, Object what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    static int pid(Connection connection) throws SQLException {
        return connection.unwrap(PGConnection.class).getBackendPID();
    }

    static String one(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getString(1);
        }
    }

    static void shortTransaction(Connection connection) throws SQLException {
        one(connection, "SELECT pg_sleep(0.002)");
        one(connection, "SELECT 1");
        connection.commit();
    }

    // A checkout always succeeds. Whether its session ended in use: with an error that an application
    // knows, once for each session.
    static boolean use(Work work) throws Exception {
        try (Connection connection = POOL.getConnection()) {
            int pid = pid(connection);
            try {
                work(connection, work);
                return false;
            } catch (PSQLException error) {
                check(error.getServerErrorMessage() != null, error);
                check("57P01".equals(error.getSQLState()), error);
                check("FATAL".equals(error.getServerErrorMessage().getSeverity()), error);
                check(error.getServerErrorMessage().getMessage().equals(WORDS), error);
                check(ENDED.add(pid), "a session ended twice");
                return true;
            }
        }
    }

    static void work(Connection connection, Work work) throws Exception {
        try {
            work.with(connection);
        } catch (PSQLException error) {
            if (!"57014".equals(error.getSQLState())) {
                throw error;
            }
            // It ran at the very end, which the next statement hears of.
            one(connection, "SELECT 1");
            throw new AssertionError("cancelled, and its session lives on");
        }
    }

    // Checks out all connections of the pool at once, and works with each; their processes. No error
    // is expected.
    static Set<Integer> fill(Work work) throws Exception {
        CyclicBarrier barrier = new CyclicBarrier(SIZE);
        Set<Integer> pids = ConcurrentHashMap.newKeySet();
        atOnce(Collections.nCopies(SIZE, () -> {
            try (Connection connection = POOL.getConnection()) {
                work.with(connection);
                barrier.await(60, TimeUnit.SECONDS);
                pids.add(pid(connection));
            }
        }), () -> { });
        check(pids.size() == SIZE, pids);
        return pids;
    }

    // Runs jobs that go on until it is over, which it is when the wait is.
    static void atOnce(List<Job> jobs, Job wait) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(jobs.size());
        List<Future<?>> futures = new ArrayList<>();
        over = false;
        for (Job job : jobs) {
            futures.add(threads.submit(() -> {
                job.run();
                return null;
            }));
        }
        try {
            wait.run();
        } finally {
            over = true;
            threads.shutdown();
        }
        for (Future<?> future : futures) {
            future.get();
        }
    }

    static void loop() throws Exception {
        while (!over) {
            use(Pool::shortTransaction);
        }
    }

    // A superuser sees which server processes there are.
    static void gone(Set<Integer> pids, String what) throws Exception {
        URI dsn = URI.create(System.getenv("PG_SUPERUSER_DSN"));
        String[] login = dsn.getUserInfo().split(":");
        String url = "jdbc:postgresql://" + dsn.getAuthority().split("@")[1] + dsn.getPath();
        String list = pids.toString().replace('[', '(').replace(']', ')');
        String query = "SELECT count(*) FROM pg_stat_activity WHERE pid IN " + list;
        try (Connection watch = DriverManager.getConnection(url, login[0], login[1])) {
            long began = System.nanoTime();
            while (!one(watch, query).equals("0")) {
                check(System.nanoTime() - began < 60_000_000_000L, "waited in vain for " + what);
                Thread.sleep(10);
            }
        }
    }

    static void livesOnWhenItsSessionsEnd() throws Exception {
        Set<Integer> first = fill(connection -> { });
        List<Job> jobs = new ArrayList<>(Collections.nCopies(LOOPS, Pool::loop));
        jobs.add(() -> {
            check(use(connection -> {
                one(connection, "SELECT 1");
                gone(Set.of(pid(connection)), "a transaction's session to end");
                one(connection, "SELECT 2");
            }), "a transaction outlived its session");
            loop();
        });
        jobs.add(() -> {
            check(use(connection -> one(connection, "SELECT pg_sleep(600)")), "a query outlived its session");
            loop();
        });
        atOnce(jobs, () -> gone(first, "the first sessions to end"));
        check(ENDED.size() >= 2, ENDED);
        System.out.println("sessions that ended in use: " + ENDED.size());

        Set<Integer> second = fill(connection -> { });
        gone(second, "the second sessions to end, all of them idle");
        Set<Integer> third = fill(Pool::shortTransaction);
        check(Collections.disjoint(first, second), first);
        check(Collections.disjoint(third, first) && Collections.disjoint(third, second), third);
    }

    static void retiresItsConnectionsInTime() throws Exception {
        Set<Integer> first = fill(connection -> { });
        atOnce(Collections.nCopies(SIZE, Pool::loop), () -> gone(first, "the first sessions to be retired"));
        check(ENDED.isEmpty(), ENDED);
    }

    public static void main(String[] arguments) throws Exception {
        if (LIFETIME == null) {
            livesOnWhenItsSessionsEnd();
        } else {
            retiresItsConnectionsInTime();
        }
        POOL.close();
        System.out.println("1 of 1 passed");
        System.exit(0);
    }
}
