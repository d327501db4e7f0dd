// pgx's pool while pgsilo ends its sessions. The rule is that of tests/e2e/drivers/pools.py: a
// session that ends while it is idle is never seen by the application; one that ends in use gives
// its user one error, and the next checkout succeeds. The last line says that all has run.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

const loops = 2

var (
	ctx      = context.Background()
	size     = number("PGSILO_POOL_SIZE")
	words    = os.Getenv("PGSILO_WORDS")
	lifetime = os.Getenv("PGSILO_LIFETIME")
	pool     *pgxpool.Pool
	ended    sync.Map
	inUse    int32
)

type work func(connection *pgxpool.Conn) error

func number(name string) int {
	value, err := strconv.Atoi(os.Getenv(name))
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		log.Panicf("%v", err)
	}
}

func freshToken() string {
	answer, err := http.Get(os.Getenv("PGSILO_ISSUER"))
	check(err)
	defer answer.Body.Close()
	token, err := io.ReadAll(answer.Body)
	check(err)
	return string(token)
}

func connect() {
	dsn := fmt.Sprintf("host=%s port=%s user=app dbname=acme", os.Getenv("PGSILO_HOST"), os.Getenv("PGSILO_PORT"))
	if ca := os.Getenv("PGSILO_CA"); ca != "" {
		dsn += " sslmode=verify-full sslrootcert=" + ca
	}
	config, err := pgxpool.ParseConfig(dsn)
	check(err)
	config.MaxConns = int32(size)
	config.BeforeConnect = func(_ context.Context, config *pgx.ConnConfig) error {
		config.Password = freshToken()
		return nil
	}
	config.BeforeAcquire = func(ctx context.Context, connection *pgx.Conn) bool {
		return connection.Ping(ctx) == nil
	}
	if lifetime != "" {
		config.MaxConnLifetime = time.Duration(number("PGSILO_LIFETIME")) * time.Second
		config.HealthCheckPeriod = config.MaxConnLifetime
	}
	pool, err = pgxpool.ConnectConfig(ctx, config)
	check(err)
}

func pid(connection *pgxpool.Conn) uint32 {
	return connection.Conn().PgConn().PID()
}

func run(connection *pgxpool.Conn, sql string) error {
	_, err := connection.Exec(ctx, sql)
	return err
}

func shortTransaction(connection *pgxpool.Conn) error {
	return connection.BeginFunc(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_sleep(0.002)"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "SELECT 1")
		return err
	})
}

// A checkout always succeeds. Whether its session ended in use: with an error that an application
// knows, once for each session.
func use(do work) bool {
	connection, err := pool.Acquire(ctx)
	check(err)
	defer connection.Release()
	pid := pid(connection)
	err = do(connection)
	if err == nil {
		return false
	}
	var told *pgconn.PgError
	if errors.As(err, &told) && told.Code == "57014" {
		// It ran at the very end, which the next statement hears of.
		err = run(connection, "SELECT 1")
	}
	if !errors.As(err, &told) || told.Severity != "FATAL" || told.Code != "57P01" || told.Message != words {
		log.Panicf("%v", err)
	}
	if _, twice := ended.LoadOrStore(pid, true); twice {
		log.Panic("a session ended twice")
	}
	atomic.AddInt32(&inUse, 1)
	return true
}

// Checks out all connections of the pool at once, and works with each; their processes. No error
// is expected.
func fill(do work) []int {
	connections := make([]*pgxpool.Conn, size)
	atOnce(size, func(n int) {
		connection, err := pool.Acquire(ctx)
		check(err)
		check(do(connection))
		connections[n] = connection
	})
	pids := make([]int, size)
	for n, connection := range connections {
		pids[n] = int(pid(connection))
		connection.Release()
	}
	return pids
}

func atOnce(jobs int, job func(n int)) {
	var group sync.WaitGroup
	for n := 0; n < jobs; n++ {
		group.Add(1)
		go func(n int) {
			defer group.Done()
			job(n)
		}(n)
	}
	group.Wait()
}

// A superuser sees which server processes there are.
func left(watch *pgx.Conn, pids []int) (count int) {
	check(watch.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", pids).Scan(&count))
	return count
}

func gone(pids []int, what string) {
	watch, err := pgx.Connect(ctx, os.Getenv("PG_SUPERUSER_DSN"))
	check(err)
	defer watch.Close(ctx)
	for began := time.Now(); left(watch, pids) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			log.Panic("waited in vain for ", what)
		}
	}
}

// Each job goes on with short transactions until the processes are gone.
func workUntilGone(pids []int, jobs []func()) {
	over := make(chan struct{})
	go func() {
		gone(pids, "the first sessions to be gone")
		close(over)
	}()
	atOnce(len(jobs), func(n int) {
		jobs[n]()
		for {
			select {
			case <-over:
				return
			default:
				use(shortTransaction)
			}
		}
	})
}

func idleInATransaction() {
	interrupted := use(func(connection *pgxpool.Conn) error {
		if err := run(connection, "BEGIN"); err != nil {
			return err
		}
		gone([]int{int(pid(connection))}, "a transaction's session to end")
		return run(connection, "SELECT 2")
	})
	if !interrupted {
		log.Panic("a transaction outlived its session")
	}
}

func inAQuery() {
	interrupted := use(func(connection *pgxpool.Conn) error {
		return run(connection, "SELECT pg_sleep(600)")
	})
	if !interrupted {
		log.Panic("a query outlived its session")
	}
}

func nothing(*pgxpool.Conn) error { return nil }

func livesOnWhenItsSessionsEnd() {
	first := fill(nothing)
	jobs := []func(){idleInATransaction, inAQuery}
	for n := 0; n < loops; n++ {
		jobs = append(jobs, func() {})
	}
	workUntilGone(first, jobs)
	if inUse < 2 {
		log.Panic("too few ended in use: ", inUse)
	}
	fmt.Println("sessions that ended in use:", inUse)
	second := fill(nothing)
	gone(second, "the second sessions to end, all of them idle")
	third := fill(shortTransaction)
	seen := map[int]bool{}
	for _, pid := range append(append(first, second...), third...) {
		seen[pid] = true
	}
	if len(seen) != 3*size {
		log.Panic("a session lived on: ", first, second, third)
	}
}

func retiresItsConnectionsInTime() {
	jobs := make([]func(), size)
	for n := range jobs {
		jobs[n] = func() {}
	}
	workUntilGone(fill(nothing), jobs)
	if inUse != 0 {
		log.Panic("sessions ended in use: ", inUse)
	}
}

func main() {
	connect()
	if lifetime == "" {
		livesOnWhenItsSessionsEnd()
	} else {
		retiresItsConnectionsInTime()
	}
	pool.Close()
	fmt.Println("1 of 1 passed")
}
