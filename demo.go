package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/ports"
)

const (
	demoDatabase    = "todo"
	demoOldestMajor = 14
	demoCloseLimit  = 30 * time.Second
)

// demoServe runs the gateway on a configuration file until ctx ends, and sends its base URL once it serves.
type demoServe func(ctx context.Context, configPath string, ready chan<- string) error

// demoToken signs a token with the secret of a configuration file.
type demoToken func(configPath, sub string, roles []string, claims map[string]any) (string, error)

// demoOptions are the demo's flags and what the command is wired to.
type demoOptions struct {
	dir       string        // Where everything is kept; empty: a temporary directory, removed at the end.
	configOut string        // Where the gateway's configuration is written too; empty: nowhere else.
	port      int           // The gateway's; 0: a free one.
	pgPort    int           // PostgreSQL's; 0: a free one.
	rate      float64       // Statements a second of the application's writer.
	duration  time.Duration // 0: until ctx ends.

	out   io.Writer
	serve demoServe
	token demoToken
}

// newDemoCommand makes `walgate demo` around the given gateway and token signer.
func newDemoCommand(serve demoServe, token demoToken) *cobra.Command {
	o := demoOptions{serve: serve, token: token}
	command := &cobra.Command{
		Use:   "demo",
		Short: "Show walgate at work: a private PostgreSQL, a to-do application that writes, and the gateway",
		Long: "demo starts a private PostgreSQL with the database of a small to-do application, a writer that behaves like\n" +
			"that application, and the gateway. It prints tokens and commands to try, and shows what one user's client\n" +
			"receives. Nothing outside its directory is touched. Ctrl-C ends it and removes everything.",
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(command.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // A second Ctrl-C doesn't wait.
			ignoreDemoEnvironment(command.ErrOrStderr())
			o.out = command.OutOrStdout()
			return runDemo(ctx, o)
		},
	}
	flags := command.Flags()
	flags.StringVar(&o.dir, "dir", "", "directory for the demo's files, kept at the end (default: a temporary one, removed)")
	flags.IntVar(&o.port, "port", 0, "port of the gateway on 127.0.0.1 (0: a free one)")
	flags.IntVar(&o.pgPort, "pg-port", 0, "port of PostgreSQL on 127.0.0.1 (0: a free one)")
	flags.Float64Var(&o.rate, "rate", 2, "changes a second that the application writes (0: none)")
	flags.DurationVar(&o.duration, "duration", 0, "time after which the demo ends (0: at Ctrl-C)")
	flags.StringVar(&o.configOut, "config-out", "", "file to write the gateway's configuration to as well")
	return command
}

// ignoreDemoEnvironment removes the settings that would win over the demo's configuration: the demo alters its source
// without asking, so it must never be led to somebody's real database.
func ignoreDemoEnvironment(warn io.Writer) {
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "WALGATE_") || name == pgserver.BinEnv {
			continue
		}
		fmt.Fprintf(warn, "the demo uses its own configuration and ignores %s\n", name)
		_ = os.Unsetenv(name) // Fails only on names that can't be in the environment.
	}
}

// demo is one run.
type demo struct {
	demoOptions
	configPath string
	version    int
	database   string        // Connection string to the application's database.
	guided     chan struct{} // Closed once the guide is printed.
}

// runDemo runs the demo until ctx or its duration ends, and cleans up.
func runDemo(ctx context.Context, o demoOptions) (err error) {
	if o.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.duration)
		defer cancel()
	}
	ended := ctx
	defer func() {
		if ended.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
			err = nil // Being told to end is no failure, however early.
		}
	}()
	keep := o.dir != ""
	if o.dir, err = demoDir(o.dir); err != nil {
		return err
	}
	if !keep {
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	server, err := startDemoPostgres(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		fmt.Fprintln(o.out, "Stopping PostgreSQL.")
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), demoCloseLimit)
		defer cancel()
		err = errors.Join(err, server.Close(ctx))
	}()
	d := &demo{demoOptions: o, version: server.Version(), database: server.DSN(demoDatabase), guided: make(chan struct{})}
	if err := createDemoApp(ctx, server.DSN("postgres"), d.database); err != nil {
		return err
	}
	if err := d.writeConfig(); err != nil {
		return err
	}
	return d.run(ctx)
}

// demoDir makes the demo's directory. Others may pass through it, not list it: where the demo is root, PostgreSQL runs
// as another user in a directory below.
func demoDir(dir string) (string, error) {
	if dir == "" {
		temporary, err := os.MkdirTemp("", "walgate-demo-")
		if err != nil {
			return "", err
		}
		return temporary, os.Chmod(temporary, 0o711)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o711)
}

func startDemoPostgres(ctx context.Context, o demoOptions) (*pgserver.Server, error) {
	installs, err := pgserver.FindOrDownload(ctx, func(what string) { fmt.Fprintln(o.out, what) })
	if err != nil {
		return nil, err
	}
	if installs[0].Major < demoOldestMajor {
		return nil, fmt.Errorf("the newest PostgreSQL on this machine is %s, and walgate needs %d: install a newer one, or name it in %s",
			installs[0].Version, demoOldestMajor, pgserver.BinEnv)
	}
	password, err := demoSecret(filepath.Join(o.dir, "password"))
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(o.out, "Starting PostgreSQL %s from %s.\n", installs[0].Version, installs[0].Bin)
	return pgserver.Start(ctx, pgserver.Options{
		Install: installs[0], Dir: filepath.Join(o.dir, "postgres"), Port: o.pgPort, Password: password,
	})
}

// demoSecret returns the random secret in a file, made by the first run on the directory.
func demoSecret(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err == nil {
		return string(text), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	secret := rand.Text() + rand.Text()
	return secret, os.WriteFile(path, []byte(secret), 0o600)
}

// writeConfig writes the gateway's configuration and remembers where.
func (d *demo) writeConfig() (err error) {
	secret, err := demoSecret(filepath.Join(d.dir, "jwt-secret"))
	if err != nil {
		return err
	}
	if d.port == 0 {
		if d.port, _, err = ports.Reserve(); err != nil {
			return err
		}
	}
	d.configPath = filepath.Join(d.dir, "config.yaml")
	text := []byte(demoConfig(d.database, d.dir, d.port, secret))
	if d.configOut != "" {
		if err := os.WriteFile(d.configOut, text, 0o600); err != nil {
			return fmt.Errorf("write the configuration to --config-out: %w", err)
		}
	}
	return os.WriteFile(d.configPath, text, 0o600)
}

// demoConfig returns the gateway's configuration for the to-do application: everybody sees what they own and what
// belongs to their teams.
func demoConfig(database, dir string, port int, secret string) string {
	return fmt.Sprintf(`# The configuration that walgate demo runs its gateway with.

auto_init: true # the source belongs to the demo

database:
  url: %q

http:
  listen: "127.0.0.1:%d"
  public_url: "http://127.0.0.1:%[2]d"

auth:
  jwt: {secret: %[3]q}

log: {level: warn, format: text}

blobs: {url: "file://%[4]s/blobs"}
attachments: {grace: 1m} # so that one can see files go

collections:
  teams:
    table: public.teams
    scope: {id: claims.teams}
  lists:
    table: public.lists
    scope:
      - {owner_id: claims.sub}
      - {team_id: claims.teams}
    write: {roles: [user], columns: [team_id, name, color], set: {owner_id: claims.sub}}
  todos:
    table: public.todos
    scope:
      - {owner_id: claims.sub}
      - {team_id: claims.teams}
    write: {roles: [user], columns: [list_id, team_id, title, done, due, photo_id], set: {owner_id: claims.sub}, check: "size(row.title) > 0"}
    conflict: merge
    attachments: [{column: photo_id}]
  comments:
    table: public.comments
    scope:
      - {owner_id: claims.sub}
      - {team_id: claims.teams}
`, database, port, secret, filepath.ToSlash(dir))
}

// run runs the gateway, and once it serves, the application's writer and Ana's client, until ctx ends or one fails.
// The database outlives all of them.
func (d *demo) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	ready := make(chan string, 1)
	group.Go(func() error {
		err := d.serve(ctx, d.configPath, ready)
		if err == nil && ctx.Err() == nil {
			err = errors.New("the gateway ended by itself: see its log above")
		}
		return err
	})
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case base := <-ready:
			if err := demoReady(ctx, base); err != nil {
				return err
			}
			group.Go(func() error { return demoWriter(ctx, d.database, d.rate) })
			group.Go(func() error { return d.tabletReturns(ctx, base) })
			group.Go(func() error { return d.camera(ctx, base) })
			return d.watch(ctx, base)
		}
	})
	err := group.Wait()
	fmt.Fprintln(d.out, "\nThe gateway, the application and Ana's client have stopped.")
	return err
}

// anasToken and bensToken sign tokens as the application's own login would.
func (d *demo) anasToken() (string, error) {
	return d.token(d.configPath, demoAna, []string{"user"}, map[string]any{"teams": []any{demoDesign}})
}

func (d *demo) bensToken() (string, error) {
	return d.token(d.configPath, demoBen, []string{"user"}, map[string]any{"teams": []any{demoDesign, demoKitchen}})
}

// printGuide prints what there is and commands to try. since is where Ana's client stands.
func (d *demo) printGuide(base, since string) error {
	ana, err := d.anasToken()
	if err != nil {
		return fmt.Errorf("sign Ana's token: %w", err)
	}
	ben, err := d.bensToken()
	if err != nil {
		return fmt.Errorf("sign Ben's token: %w", err)
	}
	_, err = fmt.Fprint(d.out, strings.NewReplacer(
		"{BASE}", base, "{WS}", "ws"+strings.TrimPrefix(base, "http"), "{DSN}", d.database, "{DIR}", d.dir,
		"{VERSION}", fmt.Sprint(d.version), "{ANA}", ana, "{BEN}", ben, "{SINCE}", since, "{COLLECTIONS}", demoCollections,
		"{LOGO}", demoLogoList, "{DESIGN}", demoDesign, "{LIST}", demoAnasInbox, "{OWNER}", demoAna, "{SUBSCRIBE}", demoSubscribe(since),
	).Replace(demoGuide))
	return err
}

const demoGuide = `
The gateway is at {BASE}, PostgreSQL {VERSION} at
  {DSN}
and their files are in {DIR}.

Tokens of two users. Ana is in the team Design, Ben in Design and Kitchen:

  export ANA='{ANA}'
  export BEN='{BEN}'

All that Ana may see, then what has changed since (waits up to 25 s):

  curl -sN -H "Authorization: Bearer $ANA" '{BASE}/sync/full?collections={COLLECTIONS}&limit=all'
  curl -s -H "Authorization: Bearer $ANA" '{BASE}/sync/pull?since={SINCE}&wait=25s'

All that Ben may see; put his own last_seq into the line above to go on as Ben:

  curl -sN -H "Authorization: Bearer $BEN" '{BASE}/sync/full?collections={COLLECTIONS}&limit=all'

Ana's changes as they happen, over a WebSocket; either of:

  echo '{SUBSCRIBE}' | websocat -n -H "Authorization: Bearer $ANA" {WS}/sync/stream
  npx -y wscat -c {WS}/sync/stream -H "Authorization: Bearer $ANA" -w 3600 -x '{SUBSCRIBE}'

Push an edit as Ana's phone would; repeated with the same change_id it is done once:

  curl -s -H "Authorization: Bearer $ANA" -H 'Content-Type: application/json' '{BASE}/sync/push' -d '{"client_id":"anas-phone","changes":[{"change_id":"1","collection":"todos","operation":"insert","local_id":"note-1","data":{"list_id":"{LIST}","title":"Pushed with curl"}}]}'

Two devices and a photo: Ana's phone uploads it and a row that names it, Ben's tablet is told to download it:

  curl -s -H "Authorization: Bearer $ANA" -H 'Content-Type: image/png' -T photo.png '{BASE}/attachments/anas-photo.png'
  curl -s -H "Authorization: Bearer $ANA" -H 'Content-Type: application/json' '{BASE}/sync/push' -d '{"client_id":"anas-phone","changes":[{"change_id":"2","collection":"todos","operation":"insert","local_id":"note-2","data":{"list_id":"{LOGO}","team_id":"{DESIGN}","title":"See the photo","photo_id":"anas-photo.png"}}]}'
  curl -s -H "Authorization: Bearer $BEN" -H 'Content-Type: application/json' '{BASE}/attachments/manifest' -d '{"client_id":"bens-laptop","since_version":0}'

The application clears the column, and every device is told to delete the file (ask again from the current_version):

  psql '{DSN}' -c "UPDATE todos SET photo_id = NULL WHERE photo_id = 'anas-photo.png'"

Write as any application would, and see it arrive below:

  psql '{DSN}' -c "INSERT INTO todos (list_id, owner_id, title) VALUES ('{LIST}', '{OWNER}', 'Written in psql')"

Ctrl-C ends the demo. Below, Ben's tablet goes offline and returns, and his camera adds photos to todos. The other lines
are what Ana's client receives, files too, and how long after the commit:

`
