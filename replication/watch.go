package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// Definitions is one state of catalog and compiled policies. Immutable.
type Definitions struct {
	Catalog *schema.Catalog
	Set     *policies.Set
	Stopped map[string]string // collections that the present catalog doesn't allow, and why
	// Impaired are collections that go on but not in all ways, and why: their full resyncs fail, or rows may come that
	// can't be followed.
	Impaired map[string]string
	shapes   string
}

// Watcher follows the source's catalog and keeps the policies compiled against it. Safe for concurrent use.
type Watcher struct {
	pool         *pgxpool.Pool
	types        schema.Types
	publications schema.Publications
	specs        map[string]policies.Spec
	autoInit     bool
	every        time.Duration
	log          *slog.Logger

	whole    *policies.Set // of all collections, as they compiled at the start
	loading  sync.Mutex
	current  atomic.Pointer[Definitions]
	known    atomic.Uint64 // the catalog was read after this place of the WAL was written
	mu       sync.Mutex
	onChange map[int]func()
	nextID   int
}

// NewWatcher returns a watcher that polls every so often once it runs. With autoInit it lets new partitions join.
func NewWatcher(pool *pgxpool.Pool, p schema.Publications, specs map[string]policies.Spec, autoInit bool, every time.Duration, log *slog.Logger) *Watcher {
	return &Watcher{pool: pool, publications: p, specs: specs, autoInit: autoInit, every: every, log: log, onChange: map[int]func(){}}
}

// Start loads the catalog and compiles the policies for the first time. Faults are the configuration's: start-up ends.
func (w *Watcher) Start(ctx context.Context) ([]policies.Fault, error) {
	cat, err := w.loadCatalog(ctx)
	if err != nil {
		return nil, err
	}
	set, faults := compile(w.specs, cat)
	if len(faults) > 0 {
		return faults, nil
	}
	w.whole = set
	w.current.Store(&Definitions{Catalog: cat, Set: set, Impaired: impaired(set, w.pool.Config().ConnConfig.User), shapes: shapes(cat)})
	return nil, nil
}

// Look loads the catalog for somebody who only wants to see: in place of Start, for what doesn't compile ends nothing.
func (w *Watcher) Look(ctx context.Context) error {
	_, err := w.refresh(ctx)
	return err
}

// Current returns the newest definitions; nil before Start.
func (w *Watcher) Current() *Definitions { return w.current.Load() }

// Types returns the registry that the catalog's types are in.
func (w *Watcher) Types() *schema.Types { return &w.types }

// Run polls until ctx ends, and calls everybody who asked after each look: a collection that the stream had stopped goes on
// when the catalog is found in order.
func (w *Watcher) Run(ctx context.Context) error {
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	var joined *Definitions // all of its tables are in the publication
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		_, err := w.refresh(ctx)
		if d := w.Current(); err == nil && w.autoInit && (d != joined || len(d.Stopped) > 0) {
			if w.join(ctx, d.Catalog) {
				joined = d
			}
			_, err = w.refresh(ctx)
		}
		if err == nil {
			w.tell()
		} else if ctx.Err() == nil {
			w.log.Warn("the source's catalog can't be read; trying again", "error", err)
		}
	}
}

// Reload reads the catalog now and, where it changed, compiles anew and calls everybody who asked.
func (w *Watcher) Reload(ctx context.Context) error {
	changed, err := w.refresh(ctx)
	if err == nil && changed {
		w.tell()
	}
	return err
}

// tell calls the others without the lock of refresh: they talk to the database, and the stream must not wait for that.
func (w *Watcher) tell() {
	w.mu.Lock()
	calls := slices.Collect(maps.Values(w.onChange))
	w.mu.Unlock()
	for _, f := range calls {
		f()
	}
}

// refresh reads the catalog and says whether it changed.
func (w *Watcher) refresh(ctx context.Context) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	w.loading.Lock()
	defer w.loading.Unlock()
	cat, err := w.loadCatalog(ctx)
	if err != nil {
		return false, err
	}
	old := w.current.Load()
	if old != nil && old.shapes == shapes(cat) {
		return false, nil
	}
	d := &Definitions{Catalog: cat, shapes: shapes(cat)}
	d.Set, d.Stopped = w.compileWhatCan(cat)
	d.Impaired = impaired(d.Set, w.pool.Config().ConnConfig.User)
	w.current.Store(d)
	for name, why := range d.Stopped {
		if old == nil || old.Stopped[name] != why {
			w.log.Error("collection stopped: its table no longer fits its policy", "collection", name, "reason", why)
		}
	}
	for name, why := range d.Impaired {
		if old == nil || old.Impaired[name] != why {
			w.log.Error("collection impaired", "collection", name, "reason", why)
		}
	}
	return true, nil
}

// OnChange calls f after each change until the returned function is called.
func (w *Watcher) OnChange(f func()) (remove func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := w.nextID
	w.nextID++
	w.onChange[id] = f
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.onChange, id)
	}
}

// knows says whether the catalog was read after a place of the WAL was written: reading it again tells nothing more about a
// layout from there.
func (w *Watcher) knows(at changelog.LSN) bool { return uint64(at) < w.known.Load() }

var errStandby = errors.New("the source is a standby, which can't be followed: waiting until it is promoted; else let database.url name the primary")

// loadCatalog reads everything in one snapshot: two halves of different times would hide what changed in between.
func (w *Watcher) loadCatalog(ctx context.Context) (cat *schema.Catalog, err error) {
	var at *int64
	if err := w.pool.QueryRow(ctx, `SELECT CASE WHEN NOT pg_is_in_recovery() THEN (pg_current_wal_insert_lsn() - '0/0')::int8 END`).Scan(&at); err != nil {
		return nil, err
	}
	if at == nil {
		return nil, errStandby
	}
	defer func() {
		if err == nil {
			w.known.Store(uint64(*at))
		}
	}()
	err = pgx.BeginTxFunc(ctx, w.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		cat, err = schema.LoadCatalog(ctx, tx, &w.types, w.publications.Rows, TableNames(w.specs))
		return err
	})
	return cat, err
}

// joinTimeout bounds how long a table may take to join: one try for its lock. The next look tries again.
const joinTimeout = 3 * time.Second

// join lets tables and leaves that the catalog has join the publication and says whether all are in it. It holds no lock of
// the watcher: it may wait for a full resync that reads the table, that one for the log, and the log's stream for the
// catalog. One table that is locked doesn't hold up the others.
func (w *Watcher) join(ctx context.Context, cat *schema.Catalog) (all bool) {
	conn, err := w.pool.Acquire(ctx)
	if err == nil {
		defer conn.Release()
		var steps []schema.Step
		steps, err = PlanFor(ctx, conn.Conn(), w.publications, w.compilable(cat), cat)
		for _, s := range steps {
			failed := w.prepare(ctx, conn.Conn(), s)
			err = errors.Join(err, failed)
			if conn.Conn().IsClosed() { // a call that was given up
				break
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		w.log.Warn("a changed table could not join the publication; trying again", "error", err)
	}
	return err == nil
}

func (w *Watcher) prepare(ctx context.Context, conn *pgx.Conn, s schema.Step) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	failpoint.Here(failpoint.TableJoins)
	err := schema.ExecuteOnce(ctx, conn, s)
	if err == nil {
		w.log.Info("prepared the source", "step", s.What)
	}
	return err
}

// compilable compiles the collections that the catalog allows, published or not.
func (w *Watcher) compilable(cat *schema.Catalog) *policies.Set {
	set, _ := w.compileWhat(cat, func(*policies.Set) []policies.Fault { return nil })
	return set
}

// collectionOf names the collection that a fault is about; a fault that names none is laid to the first one.
func collectionOf(f policies.Fault, specs map[string]policies.Spec) string {
	name := strings.Split(strings.TrimPrefix(f.Path, "collections."), ".")[0]
	if _, ok := specs[name]; !ok && len(specs) > 0 {
		return slices.Min(slices.Collect(maps.Keys(specs)))
	}
	return name
}

// planAttempts is how often Join plans anew because somebody else altered the publication meanwhile, beside once for each
// step: instances that start together on a new source do the same steps, and each may lose every race.
const planAttempts = 3

// Join brings publication and replica identities to what the set needs and returns what it did.
func Join(ctx context.Context, conn *pgx.Conn, p schema.Publications, set *policies.Set, cat *schema.Catalog) (done []string, err error) {
	for attempt, attempts := 0, planAttempts; attempt < attempts; attempt++ {
		var steps []schema.Step
		steps, err = PlanFor(ctx, conn, p, set, cat)
		if attempt == 0 {
			attempts += len(steps)
		}
		for i := 0; i < len(steps) && err == nil; i++ {
			failpoint.Here(failpoint.TableJoins)
			if err = schema.Execute(ctx, conn, steps[i]); err == nil {
				done = append(done, steps[i].What)
			}
		}
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "42710" && pg.Code != "42704" && pg.Code != "23505" { // duplicate_object, undefined_object; unique_violation, of the catalog, where both came at once
			break
		}
	}
	return done, err
}

// PlanFor returns the steps that Join would take.
func PlanFor(ctx context.Context, conn *pgx.Conn, p schema.Publications, set *policies.Set, cat *schema.Catalog) ([]schema.Step, error) {
	published, err := schema.ReadPublished(ctx, conn, p)
	if err != nil {
		return nil, err
	}
	var wanted []schema.Synced
	for _, c := range set.Collections {
		wanted = append(wanted, schema.Synced{Table: c.Table, KeyIdentity: c.Spec.ReplicaIdentity == "default"})
	}
	return schema.Plan(p, cat, published, wanted), nil
}

func compile(specs map[string]policies.Spec, cat *schema.Catalog) (*policies.Set, []policies.Fault) {
	return policies.Compile(specs, cat.Table, cat.Names)
}

// compileWhatCan leaves out the collections that don't compile, or of which not everything arrives, and says why.
func (w *Watcher) compileWhatCan(cat *schema.Catalog) (*policies.Set, map[string]string) {
	return w.compileWhat(cat, func(set *policies.Set) []policies.Fault { return unpublished(set, cat.Publication) })
}

func (w *Watcher) compileWhat(cat *schema.Catalog, arrives func(*policies.Set) []policies.Fault) (*policies.Set, map[string]string) {
	stopped := map[string]string{}
	specs := maps.Clone(w.specs)
	for {
		set, faults := compile(specs, cat)
		remedy := "undo the change of the table, or correct the collection and restart"
		if len(faults) == 0 {
			faults, remedy = arrives(set), "run walgate init"
		}
		if len(faults) == 0 {
			if w.whole != nil {
				set.NameAs(w.whole)
			}
			return set, stopped
		}
		var names []string
		for _, f := range faults {
			name := collectionOf(f, specs)
			why := fmt.Sprintf("%s: %s, want %s", f.Path, f.Got, f.Want)
			if f.Hint != "" {
				why += " (" + f.Hint + ")"
			}
			if stopped[name] != "" {
				why = stopped[name] + "; " + why
			}
			stopped[name] = why
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			stopped[name] += ": " + remedy
			delete(specs, name)
		}
	}
}

// unpublished finds the collections of which not everything arrives: their tables left the publication, or somebody made
// it tell less.
func unpublished(set *policies.Set, p schema.Publication) (faults []policies.Fault) {
	for _, c := range set.Collections {
		fault := func(got, want string) {
			faults = append(faults, policies.Fault{Path: "collections." + c.Name + ".table", Got: got, Want: want})
		}
		t, in := c.Table, " publication "+p.Name
		switch {
		case !p.Exists:
			fault(in[1:]+" is missing", "it to exist")
		case !t.Published:
			fault(t.String()+" is not in"+in, "a published table")
		case t.Filtered:
			fault(t.String()+" is in"+in+" with a row filter", "all of its rows")
		case t.Listed:
			fault(t.String()+" is in"+in+" with a column list", "all of its columns")
		case len(p.Lacks) > 0:
			fault(in[1:]+" doesn't publish "+strings.Join(p.Lacks, ", "), "publish = 'insert, update, delete, truncate'")
		case p.ViaRoot && t.Kind == 'p':
			fault(in[1:]+" has publish_via_partition_root set", "it unset, for the rows of partitions")
		case p.HidesGenerated && slices.ContainsFunc(t.Columns, func(col schema.Column) bool { return col.Generated }):
			fault(in[1:]+" has publish_generated_columns = none, so that PostgreSQL refuses the application's updates of "+t.String(), "publish_generated_columns = stored")
		}
	}
	return faults
}

// impaired finds what doesn't stop a collection but some of its work. user is the role that reads the tables.
func impaired(set *policies.Set, user string) map[string]string {
	out := map[string]string{}
	for _, c := range set.Collections {
		t := c.Table
		switch bare := withoutFull(c); {
		case bare != "":
			out[c.Name] = withoutFullReason(bare)
		case !t.Readable:
			out[c.Name] = fmt.Sprintf("full resyncs fail because role %s may not read table %s: %s", user, t, schema.GrantRead(t, user))
		case t.RowsHidden:
			out[c.Name] = fmt.Sprintf("full resyncs fail because row-level security would hide rows of table %s from role %s, which the feed doesn't hide: ALTER ROLE %s BYPASSRLS, or disable row-level security there", t, user, pgx.Identifier{user}.Sanitize())
		}
	}
	return out
}

// withoutFull names a relation whose changes come without the whole old row although the policy needs it, or "".
func withoutFull(c *policies.Collection) string {
	t := c.Table
	switch {
	case c.Spec.ReplicaIdentity == "default":
		return ""
	case t.Kind != 'p' && t.Identity != 'f':
		return t.String()
	}
	for _, l := range t.Leaves {
		if l.Identity != 'f' {
			return l.Schema + "." + l.Name
		}
	}
	return ""
}

// bare is withoutFull of what the watcher doesn't mend by itself.
func (w *Watcher) bare(c *policies.Collection) string {
	if w.autoInit {
		return ""
	}
	return withoutFull(c)
}

func withoutFullReason(relation string) string {
	return fmt.Sprintf("table %s has no REPLICA IDENTITY FULL, so changes of its rows can't be followed: run walgate init", relation)
}

// TableNames returns schema.name of every table that the specs name.
func TableNames(specs map[string]policies.Spec) []string {
	var out []string
	for _, s := range specs {
		n := s.Table
		if !strings.Contains(n, ".") {
			n = "public." + n
		}
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}

// shapes is everything of the catalog that a change of should be noticed.
func shapes(cat *schema.Catalog) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%+v\n", cat.Publication)
	for _, t := range cat.Tables {
		fmt.Fprintf(&b, "%s %c%c%c %t %t %t %t %t\n%s", t, t.Kind, t.Persistence, t.Identity, t.Filtered, t.Listed, t.Partition, t.Readable, t.RowsHidden, t.Shape())
		for _, c := range t.Columns {
			fmt.Fprintf(&b, "%v %v %v %v\n", c.NotNull, c.HasDefault, c.Generated, c.Virtual)
		}
		for _, l := range t.Leaves {
			fmt.Fprintf(&b, "%s %c%c%c\n", l.Name, l.Kind, l.Persistence, l.Identity)
		}
	}
	return b.String()
}
