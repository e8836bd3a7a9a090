package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/walgate/walgate/internal/chaos"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

// chaosDuration is how long the command runs where it isn't told.
const chaosDuration = 10 * time.Minute

// chaosFlags are the command's.
type chaosFlags struct {
	config, schema, keep string
	binary               string // walgate; empty: this one
	seed                 uint64
	duration             time.Duration
	runs, parallel       int
}

// chaosCommand makes `walgate chaos`; config is where the root command keeps the path of the configuration.
func chaosCommand(config *string) *cobra.Command {
	var f chaosFlags
	c := &cobra.Command{
		Use: "chaos", Short: "Try out your collections on a fleet of gateways while everything around them breaks", Args: cobra.NoArgs,
		Long: "chaos takes the collections of your configuration and the SQL of your tables, and starts a private PostgreSQL, Redis,\n" +
			"three gateways and a load balancer. An application and clients of its own work on it, while gateways are killed and\n" +
			"frozen, networks cut, servers crashed and restored, the slot dropped, the standby promoted. Then all is made well\n" +
			"again, and every client must hold exactly what SELECT returns under its policy, what only one client writes must be\n" +
			"as it was acknowledged, and no client may have seen anything that wasn't so.\n\n" +
			"Your own database, Redis and blob store are never connected to: of the configuration, only `collections` is used.\n" +
			"Rows are made up. Everything that happens follows from the seed of its run, but for how the processes interleave:\n" +
			"a failed run prints how to try its seed again. A line of JSON for each run goes to standard output, what a person\n" +
			"wants to know to standard error. The exit status is 0 if no run failed, 1 if one did, 2 for wrong usage.",
		Example: "  pg_dump --schema-only \"$DATABASE_URL\" > schema.sql\n  walgate chaos --config config.yaml --schema schema.sql --duration 10m\n" +
			"  walgate chaos --config config.yaml --schema schema.sql --seed 7 --runs 1",
		RunE: func(c *cobra.Command, _ []string) error {
			f.config = *config
			if !c.Flags().Changed("seed") {
				f.seed = uint64(rand.Uint32())
			}
			if f.runs == 0 && !c.Flags().Changed("duration") {
				f.duration = chaosDuration
			}
			return runChaos(c.Context(), f, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	c.Flags().StringVar(&f.schema, "schema", "", "SQL file that makes your tables in an empty database, as pg_dump --schema-only writes it (required)")
	c.Flags().Uint64Var(&f.seed, "seed", 0, "seed of the first run; the next runs have the next ones (default: a random one)")
	c.Flags().DurationVar(&f.duration, "duration", 0, "no run begins later than this (default: 10m, or no bound with --runs)")
	c.Flags().IntVar(&f.runs, "runs", 0, "number of runs (0: as many as fit into the duration)")
	c.Flags().IntVar(&f.parallel, "parallel", 1, "runs at the same time; each uses about one core")
	c.Flags().StringVar(&f.keep, "keep", "", "directory for the logs of failed runs (default: the temporary directory)")
	return c
}

func runChaos(ctx context.Context, f chaosFlags, out, say io.Writer) error {
	o, cfg, err := chaosOptions(ctx, f, say)
	if err != nil {
		return err
	}
	// What is wrong with collections and tables is said as serve would say it, before anything is broken on purpose.
	err = chaos.TryOut(ctx, o, func(ctx context.Context, dsn string) error {
		cfg.Database.URL = DSN(dsn)
		p, err := open(ctx, cfg, toPrepare, newLogger(&Config{Log: LogConfig{Level: "error", Format: "text"}}, say))
		if err != nil {
			return err
		}
		p.close()
		return nil
	})
	var schema *chaos.SchemaError
	if errors.As(err, &schema) {
		return &usageError{fmt.Errorf("--schema %s: %w", f.schema, err)}
	}
	if err != nil {
		return err
	}
	var failed []string
	runs, did := 0, map[string]int{}
	o.Report = func(r chaos.Report) {
		runs++
		for what, n := range r.Counts {
			did[what] += n
		}
		fmt.Fprintln(out, r)
		happened := 0
		for _, n := range r.Faults {
			happened += n
		}
		if r.OK {
			fmt.Fprintf(say, "seed %d: well after %d faults, in %.1f s (%s)\n", r.Seed, happened, r.Seconds, r.Setup)
			return
		}
		failed = append(failed, fmt.Sprint(r.Seed))
		fmt.Fprintf(say, "seed %d: FAILED after %d faults (%s): %s\n%slogs and the order of events: %s\n", r.Seed, happened, r.Setup, r.Error, r.Story, r.Kept)
	}
	if _, err := chaos.Run(ctx, o); err != nil && ctx.Err() == nil {
		return fmt.Errorf("the harness failed, which says nothing about the gateway: %w", err)
	}
	switch {
	case len(failed) > 0:
		return fmt.Errorf("%d of %d runs failed: seed %s; above is what was wrong and how to run each again", len(failed), runs, strings.Join(failed, ", "))
	case runs == 0:
		return errors.New("stopped before the first run was over: nothing was tried")
	}
	for what, of := range map[string]string{"application: commits": "no row could be written", "clients: changes": "no client was told a change"} {
		if did[what] == 0 {
			return fmt.Errorf("%d runs without a violation, but nothing was tried: %s. Tables that refuse made-up rows, or refer to rows of tables that are in no collection, stay empty; the reports on standard output count what was refused", runs, of)
		}
	}
	fmt.Fprintf(say, "%d runs, no violation; %d commits, %d changes to clients, %d accepted pushes\n", runs, did["application: commits"], did["clients: changes"], did["pushes: accepted"])
	return nil
}

// chaosOptions reads the files and finds the servers' programs.
func chaosOptions(ctx context.Context, f chaosFlags, say io.Writer) (o chaos.Options, cfg *Config, err error) {
	if f.schema == "" {
		return o, nil, &usageError{errors.New("--schema is required: the SQL of your tables; make it with pg_dump --schema-only DATABASE > schema.sql")}
	}
	if f.runs < 0 || f.parallel < 1 || f.duration < 0 {
		return o, nil, &usageError{errors.New("--runs and --duration must not be negative, and --parallel must be 1 or more")}
	}
	sql, err := os.ReadFile(f.schema)
	if err != nil {
		return o, nil, &usageError{fmt.Errorf("read the tables' SQL: %w", err)}
	}
	cfg, err = Load(f.config, chaosEnvironment)
	var faults *ConfigError
	if err != nil && !errors.As(err, &faults) {
		err = &usageError{err}
	}
	if err == nil && len(cfg.Collections) == 0 {
		err = &usageError{fmt.Errorf("%s has no collections: there is nothing to try out", f.config)}
	}
	if err != nil {
		return o, nil, err
	}
	installs, err := pgserver.FindOrDownload(ctx, func(what string) { fmt.Fprintln(say, what) })
	if err != nil {
		return o, nil, err
	}
	binary := f.binary
	if binary == "" {
		if binary, err = os.Executable(); err != nil {
			return o, nil, err
		}
	}
	_, noRedis := redisserver.Find()
	if noRedis != nil {
		fmt.Fprintf(say, "%v. The runs go on without Redis: its faults aren't tried.\n", noRedis)
	}
	fakeTime := chaos.FindFakeTime()
	if fakeTime == "" {
		fmt.Fprintln(say, "libfaketime was not found (Debian: apt-get install faketime): the databases' clocks don't jump.")
	}
	fmt.Fprintf(say, "PostgreSQL %s; first seed %d\n", installs[0].Version, f.seed)
	return chaos.Options{
		Binary: binary, Install: installs[0], Redis: noRedis == nil, FakeTime: fakeTime, Schema: string(sql), Collections: cfg.Collections,
		Seed: f.seed, Runs: f.runs, Duration: f.duration, Parallel: f.parallel, Keep: f.keep,
		Replay: fmt.Sprintf("walgate chaos --config %s --schema %s --seed %%d --runs 1", strings.ReplaceAll(f.config, "%", "%%"), strings.ReplaceAll(f.schema, "%", "%%")),
	}, cfg, nil
}

// chaosEnvironment is the environment for reading an operator's configuration: what leads to their servers, and their
// secrets, are replaced, so that they needn't be set; other keys' twins count for nothing.
func chaosEnvironment(name string) (string, bool) {
	switch name {
	case "WALGATE_DATABASE_URL":
		return "postgres://nobody@127.0.0.1:1/nothing", true
	case "WALGATE_AUTH_JWT_SECRET":
		return strings.Repeat("-", 32), true
	case "WALGATE_BLOBS_URL":
		return "mem://", true
	case "WALGATE_DATABASE_REPLICATION_URL", "WALGATE_STORAGE_URL", "WALGATE_REDIS_URL", "WALGATE_AUTH_JWT_PUBLIC_KEY_FILE", "WALGATE_AUTH_JWT_JWKS_URL",
		"WALGATE_ATTACHMENTS_SIGNING_KEY", "WALGATE_HTTP_TLS_CERT_FILE", "WALGATE_HTTP_TLS_KEY_FILE", "WALGATE_PUSH_ROLE":
		return "", true
	}
	if strings.HasPrefix(name, "WALGATE_") {
		return "", false
	}
	return os.LookupEnv(name)
}
