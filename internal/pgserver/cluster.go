package pgserver

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	superuser = "postgres"
	// settingsFile is included from postgresql.conf, so that ALTER SYSTEM still overrides what it says.
	settingsFile = "walgate.conf"
)

// defaultSettings are those of every server started here: enough slots, senders and connections for many gateways and
// tests at once, and nothing that depends on the machine's locale or time zone.
func defaultSettings() map[string]string {
	return map[string]string{
		"wal_level":                 "logical",
		"listen_addresses":          "127.0.0.1",
		"max_connections":           "300",
		"max_replication_slots":     "100",
		"max_wal_senders":           "100",
		"max_prepared_transactions": "20",
		"shared_buffers":            "64MB",
		"timezone":                  "UTC",
		"log_timezone":              "UTC",
		"log_line_prefix":           "%m [%p] %d ",
		"ssl":                       "off",
	}
}

// fastSettings give up what only matters when the machine itself fails. A crash of the server alone loses nothing.
func fastSettings() map[string]string {
	return map[string]string{"fsync": "off", "full_page_writes": "off", "jit": "off"}
}

// initCluster makes a new data directory: by initdb, or, where the caller doesn't mind, by copying one that initdb
// made before, which is many times faster.
func initCluster(ctx context.Context, install Install, root, data string, o Options) error {
	if o.Fast && !o.Fresh && o.Password == "" {
		template, err := templateCluster(ctx, install)
		if err != nil {
			return err
		}
		if err := copyTree(data, template); err != nil {
			return fmt.Errorf("copy the data directory template %s: %w", template, err)
		}
		return chownTree(data, runAs())
	}
	return initdb(ctx, install, root, data, o.Password)
}

// templateCluster returns a data directory fresh from initdb, made once for this version and user.
func templateCluster(ctx context.Context, install Install) (string, error) {
	build := crc32.ChecksumIEEE([]byte(install.Bin)) // Builds of one version differ in what they can read.
	name := fmt.Sprintf("walgate-pg-template-%s-%08x-uid%d", install.Version, build, os.Getuid())
	template := filepath.Join(os.TempDir(), name)
	if ownedCache(template, runAs()) {
		return filepath.Join(template, "data"), nil
	}
	err := buildCache(template, runAs(), func(tmp string) error {
		return initdb(ctx, install, tmp, filepath.Join(tmp, "data"), "")
	})
	if err != nil {
		return "", fmt.Errorf("make a data directory template: %w", err)
	}
	return filepath.Join(template, "data"), nil
}

// initdb makes the data directory. Without a password every local connection is trusted.
func initdb(ctx context.Context, install Install, root, data, password string) error {
	args := []string{
		"--pgdata=" + data, "--username=" + superuser, "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions",
	}
	if password == "" {
		args = append(args, "--auth=trust")
	} else {
		file, err := passwordFile(root, password)
		if err != nil {
			return err
		}
		defer os.Remove(file)
		args = append(args, "--auth=scram-sha-256", "--pwfile="+file)
	}
	if err := runTool(ctx, root, filepath.Join(install.Bin, "initdb"), args...); err != nil {
		return err
	}
	conf, err := os.OpenFile(filepath.Join(data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(conf, "\ninclude_if_exists '%s'\n", settingsFile)
	return errors.Join(err, conf.Close())
}

func passwordFile(root, password string) (string, error) {
	path := filepath.Join(root, "initdb-password")
	if err := os.WriteFile(path, []byte(password+"\n"), 0o600); err != nil {
		return "", err
	}
	return path, chownTree(path, runAs())
}

// writeSettings writes the settings of this run; later maps win.
func writeSettings(data string, layers ...map[string]string) error {
	settings := map[string]string{}
	for _, layer := range layers {
		maps.Copy(settings, layer)
	}
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&text, "%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	path := filepath.Join(data, settingsFile)
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		return err
	}
	return chownTree(path, runAs())
}

// clusterMajor returns the major version that made an existing data directory, or 0 when there is none.
func clusterMajor(data string) (int, error) {
	text, err := os.ReadFile(filepath.Join(data, "PG_VERSION"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("%s/PG_VERSION holds %q, which no supported version writes: use another directory", data, text)
	}
	return major, nil
}
