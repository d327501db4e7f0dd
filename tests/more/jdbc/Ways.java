// Every way in which the PostgreSQL JDBC driver can prove who it is, beside a password: run as
// `java Ways.java`. It has no Unix sockets of its own, and wants its key in DER.

import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Properties;

public final class Ways {
    static void lands(String port, String... how) throws SQLException {
        Properties properties = new Properties();
        properties.setProperty("user", "app");
        for (int n = 0; n < how.length; n += 2) {
            properties.setProperty(how[n], how[n + 1]);
        }
        String url = "jdbc:postgresql://127.0.0.1:" + System.getenv(port) + "/acme";
        try (Connection connection = DriverManager.getConnection(url, properties);
                Statement statement = connection.createStatement();
                ResultSet rows = statement.executeQuery("SELECT current_database()")) {
            rows.next();
            if (!rows.getString(1).equals("tenant_acme")) {
                throw new AssertionError(rows.getString(1));
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        String ca = System.getenv("PGSILO_CA");
        String certificate = System.getenv("CLIENT_CERTIFICATE");
        String key = System.getenv("CLIENT_KEY_DER");
        String token = System.getenv("BOUND_TOKEN");
        lands("CERTIFICATE_PORT", "sslmode", "verify-full", "sslrootcert", ca, "sslcert", certificate,
                "sslkey", key, "password", "");
        System.out.println("by its certificate");
        lands("BOUND_PORT", "sslmode", "verify-full", "sslrootcert", ca, "sslcert", certificate,
                "sslkey", key, "password", token);
        System.out.println("with a token bound to its certificate");
        try {
            lands("BOUND_PORT", "sslmode", "verify-full", "sslrootcert", ca, "password", token);
            throw new AssertionError("let in");
        } catch (SQLException refused) {
            if (!"28P01".equals(refused.getSQLState())) {
                throw refused;
            }
        }
        System.out.println("with a bound token and no certificate it is refused");
        lands("SIDECAR_PORT", "sslmode", "disable");
        System.out.println("through a sidecar");
        System.out.println("4 of 4 passed");
    }
}
