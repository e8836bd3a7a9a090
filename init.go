package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

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
	return p.watcher.Reload(ctx)
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
	rights, err := printRights(ctx, conn.Conn(), p)
	if err != nil {
		return err
	}
	fmt.Fprint(out, rights)
	fmt.Fprintf(out, "-- last: the slot; it waits for every transaction that is open\n%s\n", replication.SlotSQL(cfg.Replication.Slot, d.Catalog.ServerVersion))
	if cfg.Storage.URL == "" {
		fmt.Fprintf(out, "\n-- the change log lives in this database: the role of database.url makes its tables in schema walgate itself\n")
	}
	return nil
}

// uninstall removes everything that init and serve made.
func uninstall(ctx context.Context, cfg *Config, logger *slog.Logger) error {
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
