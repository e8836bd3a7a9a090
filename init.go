package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

// policies returns the newest compiled policies.
func (p *parts) policies() *policies.Set { return p.watcher.Current().Set }

func (c *Config) storageURL() string {
	if c.Storage.URL != "" {
		return string(c.Storage.URL)
	}
	return string(c.Database.URL)
}

func (c *Config) replicationURL() string {
	if c.Database.ReplicationURL != "" {
		return string(c.Database.ReplicationURL)
	}
	return string(c.Database.URL)
}

// initialise prepares the source and the log; what is there already stays. The order matters: a slot can't decode WAL from
// before its publications, and a table's rows are complete only from its joining on.
func initialise(ctx context.Context, cfg *Config, p *parts, logger *slog.Logger) error {
	conn, err := p.source.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	if err := schema.Migrate(ctx, conn.Conn()); err != nil {
		return err
	}
	d := p.watcher.Current()
	done, err := replication.Join(ctx, conn.Conn(), p.publications, d.Set, d.Catalog)
	for _, what := range done {
		logger.Info("prepared the source", "step", what)
	}
	if err != nil {
		return err
	}
	slot, err := replication.EnsureSlot(ctx, conn.Conn(), cfg.Replication.Slot, logger, nil)
	if err != nil {
		return err
	}
	if slot.Created {
		logger.Info("created the replication slot", "slot", cfg.Replication.Slot, "lsn", slot.Confirmed.String())
	}
	if err := p.log.Migrate(ctx); err != nil {
		return err
	}
	if err := p.watcher.Reload(ctx); err != nil {
		return err
	}
	if len(done) == 0 && !slot.Created {
		logger.Info("the source was prepared before: nothing is left to do there")
	}
	return nil
}

// printSQL writes what initialise would do, for somebody else to run.
func printSQL(ctx context.Context, cfg *Config, p *parts, out io.Writer) error {
	conn, err := p.source.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	pending, err := schema.PendingMigrations(ctx, conn)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "-- What walgate init does in the source, to be run there in this order, each block as it stands.\n\n")
	if len(pending) > 0 {
		fmt.Fprintf(out, "-- walgate's own tables\nBEGIN;\n%sCOMMIT;\n\n", schema.MigrationSQL(pending))
	}
	d := p.watcher.Current()
	steps, err := replication.PlanFor(ctx, conn.Conn(), p.publications, d.Set, d.Catalog)
	if err != nil {
		return err
	}
	for _, s := range steps {
		fmt.Fprintln(out, s)
	}
	rights, err := printRights(ctx, conn.Conn(), cfg, p)
	if err != nil {
		return err
	}
	fmt.Fprint(out, rights)
	var made bool
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)`, cfg.Replication.Slot).Scan(&made); err != nil {
		return fmt.Errorf("look for the slot: %w", err)
	}
	if !made {
		fmt.Fprintf(out, "-- last: the slot; it waits for every transaction that is open\n%s\n", replication.SlotSQL(cfg.Replication.Slot, d.Catalog.ServerVersion))
	}
	if cfg.Storage.URL == "" {
		fmt.Fprintf(out, "\n-- the change log lives in this database: the role of database.url makes its tables in schema walgate itself\n")
	}
	return nil
}

// refuseToForget keeps the records of files from going with schema walgate: without them nobody can tell which bytes are whose.
func refuseToForget(ctx context.Context, conn *pgx.Conn) error {
	var installed bool
	err := conn.QueryRow(ctx, `SELECT to_regclass('walgate.files') IS NOT NULL`).Scan(&installed)
	if err != nil || !installed {
		return err
	}
	var files, size int64
	if err := conn.QueryRow(ctx, `SELECT count(*), coalesce(sum(size), 0)::int8 FROM walgate.files WHERE NOT bytes_gone`).Scan(&files, &size); err != nil {
		return fmt.Errorf("count walgate.files: %w", err)
	}
	if files == 0 {
		return nil
	}
	return fmt.Errorf("files of attachments are kept (%d, %s), and uninstalling forgets which is which: no later installation could serve them, and one that uses the same store would delete them as nobody's. Copy what you need, "+
		"then run walgate uninstall --forget-files; nothing was removed", files, bytesText(size))
}

// uninstall removes everything that init and serve made. With forgetFiles it does so also where files are kept.
func uninstall(ctx context.Context, cfg *Config, forgetFiles bool, logger *slog.Logger) error {
	source, err := schema.OpenPool(ctx, string(cfg.Database.URL), 2)
	if err != nil {
		return err
	}
	defer source.Close()
	conn, err := source.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	if !forgetFiles {
		if err := refuseToForget(ctx, conn.Conn()); err != nil {
			return err
		}
	}
	if err := replication.DropSlot(ctx, conn.Conn(), cfg.Replication.Slot); err != nil {
		return err
	}
	unbindBlobs(ctx, cfg, source, logger)
	if err := schema.Uninstall(ctx, conn.Conn(), schema.PublicationsFor(cfg.Replication.Publication)); err != nil {
		return err
	}
	if cfg.Storage.URL != "" {
		log, err := changelog.Open(ctx, string(cfg.Storage.URL), 1)
		if err != nil {
			return err
		}
		defer log.Close()
		if err := log.Uninstall(ctx); err != nil {
			return fmt.Errorf("drop the change log: %w", err)
		}
	}
	logger.Info("walgate is uninstalled: slot, publications and schema walgate are gone, replica identities are as before")
	return nil
}
