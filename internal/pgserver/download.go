package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"

	"github.com/walgate/walgate/internal/ports"
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

// download fetches and unpacks the binaries into cache, or uses those that an earlier call has left there. They get
// their final name only once they are whole and run.
func download(ctx context.Context, cache, source string) (Install, error) {
	final := filepath.Join(cache, "postgresql-"+string(embeddedpostgres.V18))
	if bin, err := binDir(final); err == nil {
		return inspect(ctx, bin)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Install{}, err
	}
	scratch, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return Install{}, err
	}
	defer os.RemoveAll(scratch)
	unpacked := filepath.Join(scratch, "native")
	if err := fetch(unpacked, scratch, source); err != nil {
		return Install{}, err
	}
	if err := os.Rename(unpacked, final); err != nil && !errors.Is(err, os.ErrExist) {
		return Install{}, err
	}
	bin, err := binDir(final)
	if err != nil {
		return Install{}, err
	}
	return inspect(ctx, bin)
}

// fetch downloads and unpacks the binaries. The library does so only on the way to starting a server. That server
// isn't wanted, and as root it can't start: what counts is whether its binaries are there afterwards.
func fetch(native, scratch, source string) error {
	port, release, err := ports.Reserve()
	if err != nil {
		return err
	}
	defer release()
	run := filepath.Join(scratch, "run")
	library := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedpostgres.V18).BinaryRepositoryURL(source).CachePath(filepath.Join(scratch, "archive")).
		BinariesPath(native).RuntimePath(run).Port(uint32(port)).Logger(io.Discard))
	startErr := library.Start()
	if startErr == nil {
		return library.Stop()
	}
	// Its run directory is made when all is unpacked, and initdb and the start come after.
	if _, err := os.Stat(run); err != nil {
		return startErr
	}
	return nil
}
