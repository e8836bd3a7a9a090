package changelog

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
)

const (
	randomAttachments, randomScopes, randomDocuments = 8, 6, 10
	randomHomes                                      = 2 // scopes above randomScopes
)

func attachment(n int) [16]byte  { return [16]byte{0: 0xaa, 15: byte(n)} }
func documentKey(n int) [16]byte { return [16]byte{0: 0xdd, 15: byte(n)} }

// watcher is a client: it keeps what the operations of its scopes leave it.
type watcher struct {
	scopes [][16]byte
	since  Version
	have   map[[16]byte]string
}

// poll reads one page and says whether there is more.
func (w *watcher) poll(t *testing.T, l *Log, limit int) bool {
	p, err := l.Operations(t.Context(), OperationsRequest{Scopes: w.scopes, Since: w.since, Limit: limit})
	if err != nil {
		t.Fatal(err)
	}
	last := w.since
	seen := map[[16]byte]bool{}
	for _, o := range p.Operations {
		if o.Version < last || o.Version <= w.since || o.Version > p.Last || seen[o.Attachment] || !slices.Contains(w.scopes, o.Scope) {
			t.Fatalf("page from %d to %d: %+v after %d (seen %v)", w.since, p.Last, o, last, seen[o.Attachment])
		}
		last, seen[o.Attachment] = o.Version, true
		if o.Delete {
			delete(w.have, o.Attachment)
		} else {
			w.have[o.Attachment] = string(o.SHA256)
		}
	}
	if p.More && p.Last <= w.since || !p.More && p.Last != max(p.Head.Version, w.since) {
		t.Fatalf("a page from %d ends at %d (more %v, head %d)", w.since, p.Last, p.More, p.Head.Version)
	}
	w.since = p.Last
	return p.More
}

// TestAttachmentsAgreeWithTheModel appends a random history of rows, uploads, fills, sweeps and crashes in random groups and pieces,
// and compares everything that the log tells with a model that looks through all it knows at every question.
func TestAttachmentsAgreeWithTheModel(t *testing.T) {
	t.Parallel()
	seeds := 6
	if s := os.Getenv("WALGATE_TEST_SEEDS"); s != "" {
		if n, err := strconv.Atoi(s); err == nil {
			seeds = n
		}
	}
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			(&history{t: t, r: rand.New(rand.NewPCG(uint64(seed), 7))}).run()
		})
	}
}

// history is one random run.
type history struct {
	t        *testing.T
	r        *rand.Rand
	l        *Log
	a        *Appender
	heard    <-chan *Batch
	app      *application
	model    *modelled
	universe [][2][16]byte
	clients  []*watcher
	mirror   map[[2][16]byte]Operation // from announcements, as a hub has it
	at       Version
}

func (h *history) run() {
	t := h.t
	h.l, _ = newLog(t)
	h.l.share = h.r.IntN(4)
	h.model = newModel()
	h.mirror = map[[2][16]byte]Operation{}
	for i := range randomAttachments {
		for s := range randomScopes + randomHomes {
			h.universe = append(h.universe, [2][16]byte{attachment(i), scope(byte(s))})
		}
	}
	h.app = &application{r: h.r, documents: map[int]map[[2][16]byte]bool{}, files: map[[16]byte]FileEvent{}, lsn: 16, filled: true}
	h.lead()
	for range 5 {
		w := &watcher{have: map[[16]byte]string{}}
		for s := range randomScopes + randomHomes {
			if h.r.IntN(2) == 0 {
				w.scopes = append(w.scopes, scope(byte(s)))
			}
		}
		h.clients = append(h.clients, w)
	}
	steps := 120
	for step := range steps {
		if !h.step(step) {
			continue
		}
		if w := pick(h.r, h.clients); h.r.IntN(2) == 0 { // others come later, or go on in the middle
			w.poll(t, h.l, 1+h.r.IntN(5))
		}
		h.ask()
	}
	h.finishFill()
	for _, w := range h.clients {
		for w.poll(t, h.l, 1+h.r.IntN(5)) {
		}
		maps.DeleteFunc(w.have, func(k [16]byte, _ string) bool { return h.model.lost(k, w.scopes) }) // it has kept what it had when the store lost it
		if want := h.model.held(w.scopes); !maps.Equal(w.have, want) {
			t.Errorf("a client of %x has %v, want %v", w.scopes, w.have, want)
		}
	}
	h.compareTruth()
}

// lead claims the log anew, as after a crash.
func (h *history) lead() {
	c := testClaim()
	c.SlotLSN = min(h.app.lsn, 16)
	bus := NewMemoryBus()
	ctx, cancel := context.WithCancel(h.t.Context())
	h.t.Cleanup(cancel)
	h.heard = bus.Subscribe(ctx)
	a, claimed, err := h.l.NewAppender(h.t.Context(), bus, c)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(a.Close)
	<-h.heard
	h.a, h.at = a, claimed.Version
	h.app.clock = NewClock(claimed.Version)
	h.a.att.most = 1 + h.r.IntN(60)
}

// step appends one log transaction; false: it was lost.
func (h *history) step(n int) bool {
	app, model, clock := h.app.clone(), h.model.clone(), *h.app.clock
	var pieces []Piece
	for range 1 + h.r.IntN(4) {
		pieces = append(pieces, h.transaction()...)
	}
	// Whole transactions wait together; one that is long comes in parts.
	groups := [][]Piece{pieces}
	if len(pieces) > 1 && h.r.IntN(3) == 0 {
		for i := range pieces[:len(pieces)-1] { // all one transaction
			pieces[i].Final, pieces[i].LSN = false, 0
			pieces[i+1].Tx, pieces[i+1].Xid = cmp.Or(pieces[i].Tx, pieces[i+1].Tx), cmp.Or(pieces[i].Xid, pieces[i+1].Xid)
		}
		cut := 1 + h.r.IntN(len(pieces)-1)
		groups = [][]Piece{pieces[:cut], pieces[cut:]}
	}
	for i, g := range groups {
		for j := range g {
			h.model.apply(&g[j])
		}
		appendNow(h.t, h.a, g...)
		if i == 0 && len(groups) > 1 && h.r.IntN(4) == 0 {
			h.a.Close() // nothing of it may be left
			h.app, h.model = app, model
			h.app.clock = &clock
			h.lead()
			return false
		}
	}
	h.hear(n, pieces)
	return true
}

func (h *history) transaction() []Piece {
	p := Piece{Final: true, Size: 1}
	a := h.app
	switch k := h.r.IntN(20); {
	case k < 11:
		for range 1 + h.r.IntN(3) {
			a.change(&p)
		}
	case k < 16:
		a.upload(&p)
		if h.r.IntN(3) == 0 {
			a.change(&p)
			a.upload(&p)
		}
	case k == 16:
		a.refill(&p)
	case k == 17 && a.filled: // a step of a fill that was overtaken
		v := a.version()
		p.Version = v
		rows, _ := a.rows(3)
		for i := range rows {
			rows[i].References = append(rows[i].References, Reference{Attachment: attachment(0), Scope: scope(0)})
			rows[i].Version = v
		}
		p.Fills = []FillStep{{Fill: a.fill - 1, Collection: 1, Version: v, Rows: rows, From: v}}
	case k == 18 && !a.filled:
		return append(h.fillStep(), h.last(Piece{Final: true}))
	case k == 19:
		return h.fillBytes()
	default:
		a.change(&p)
	}
	return []Piece{h.last(p)}
}

func (h *history) last(p Piece) Piece {
	h.app.lsn += 10
	p.LSN, p.Final = h.app.lsn, true
	p.Version = max(p.Version, h.app.clock.Last())
	return p
}

// fillStep reads rows, lets changes come that the snapshot doesn't show, and then brings the rows.
func (h *history) fillStep() []Piece {
	a := h.app
	from := a.clock.Last() + 1
	rows, at := a.rows(1 + h.r.IntN(5))
	var out []Piece
	for range h.r.IntN(4) {
		p := Piece{}
		a.change(&p)
		out = append(out, h.last(p))
	}
	v := a.version()
	for i := range rows {
		rows[i].Version = v
	}
	a.fillAt = at
	s := FillStep{Fill: a.fill, Collection: 1, Version: v, Rows: rows, From: from, Position: []string{strconv.Itoa(at)}, Done: at >= randomDocuments}
	out = append(out, h.last(Piece{Version: v, Fills: []FillStep{s}}))
	if s.Done {
		a.filled = true
		out = append(out, h.sweepStep())
	}
	return out
}

// sweepStep removes what earlier fills wrote: here in one step, for the table is small.
func (h *history) sweepStep() Piece {
	v := h.app.version()
	s := FillStep{Fill: h.app.fill, Collection: 1, Version: v, SweepTo: 1 << 20, Swept: true}
	for f := range h.app.fill {
		s.Stale = append(s.Stale, f)
	}
	return h.last(Piece{Version: v, Fills: []FillStep{s}})
}

// fillBytes begins the bytes anew: an older source, which lost a file. The rows come as the source has them.
func (h *history) fillBytes() []Piece {
	a := h.app
	v := a.version()
	a.next++
	a.bytesFill = a.next
	out := []Piece{h.last(Piece{Version: v, Fills: []FillStep{{Fill: a.bytesFill, Version: v, Start: true}}})}
	for k := range a.files {
		if h.r.IntN(4) == 0 {
			delete(a.files, k)
		}
	}
	v = a.version()
	p := Piece{Version: v}
	for _, e := range a.files {
		e.Version = v
		p.Files = append(p.Files, e)
	}
	p.Fills = []FillStep{{Fill: a.bytesFill, Version: v, Done: true}, {Fill: a.bytesFill, Version: v, SweepTo: 1 << 20, Swept: true}}
	return append(out, h.last(p))
}

func (h *history) finishFill() {
	for n := 0; !h.app.filled; n++ {
		pieces := h.fillStep()
		for i := range pieces {
			h.model.apply(&pieces[i])
		}
		appendNow(h.t, h.a, pieces...)
		h.hear(-1-n, pieces)
	}
}

// hear checks what was announced, and follows it as a hub does.
func (h *history) hear(step int, pieces []Piece) {
	b := <-h.heard
	versions := map[[16]byte][]Version{}
	for _, p := range pieces {
		for _, r := range p.References {
			versions[r.Attachment] = append(versions[r.Attachment], r.Version)
		}
		for _, e := range p.Files {
			versions[e.Key] = append(versions[e.Key], e.Version)
		}
		for _, s := range p.Fills {
			for i := range randomAttachments {
				versions[attachment(i)] = append(versions[attachment(i)], s.Version)
			}
		}
	}
	if err := h.model.commit(b.Operations, versions, h.universe); err != nil {
		h.t.Fatalf("step %d: %v\n%+v", step, err, pieces)
	}
	if b.Prev != h.at {
		h.t.Fatalf("announced from %d, want %d", b.Prev, h.at)
	}
	if h.r.IntN(3) > 0 {
		for _, o := range b.Operations {
			h.mirror[[2][16]byte{o.Attachment, o.Scope}] = o
		}
		h.at = b.Last
		return
	}
	for h.at < b.Last { // as if it had been omitted
		p, err := h.l.ReadAll(h.t.Context(), h.at, b.Last, 1+h.r.IntN(6), 1<<20)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, o := range p.Operations {
			if o.Version <= h.at || o.Version > p.Last {
				h.t.Fatalf("a page from %d to %d holds %+v", h.at, p.Last, o)
			}
			h.mirror[[2][16]byte{o.Attachment, o.Scope}] = o
		}
		for _, e := range p.Entries {
			if e.Version <= h.at || e.Version > p.Last {
				h.t.Fatalf("a page from %d to %d holds version %d", h.at, p.Last, e.Version)
			}
		}
		if p.Last <= h.at {
			h.t.Fatalf("a page from %d ends at %d", h.at, p.Last)
		}
		h.at = p.Last
	}
	same := func(a, b Operation) bool {
		return a.Version == b.Version && a.Delete == b.Delete && a.ID == b.ID && string(a.SHA256) == string(b.SHA256)
	}
	if !maps.EqualFunc(h.mirror, h.model.operations, same) {
		h.t.Fatalf("a hub has %v\nwant %v", h.mirror, h.model.operations)
	}
}

// ask compares what the log answers of random scopes with the model.
func (h *history) ask() {
	scopes := pick(h.r, h.clients).scopes
	var keys [][16]byte
	for i := range randomAttachments {
		keys = append(keys, attachment(i))
	}
	got, err := h.l.Held(h.t.Context(), keys, scopes)
	if err != nil {
		h.t.Fatal(err)
	}
	held := h.model.held(scopes)
	for i, k := range keys {
		var want Held
		want.Any, want.Within, want.Outside = h.model.named(k, scopes)
		want.Known = got[i].Known // has a test of its own
		_, want.Readable = held[k]
		want.Known = got[i].Known // has a test of its own
		if got[i] != want {
			h.t.Fatalf("attachment %d and %x: %+v, want %+v", i, scopes, got[i], want)
		}
	}
	order := pick(h.r, []string{"id", "-id", "date", "-date", "size", "-size"})
	var listed []string
	for after := ""; ; {
		p, err := h.l.Attachments(h.t.Context(), ListRequest{Scopes: scopes, Order: order, After: after, Limit: 1 + h.r.IntN(3)})
		if err != nil {
			h.t.Fatal(err)
		}
		for _, o := range p.Attachments {
			listed = append(listed, o.ID)
			if held[o.Attachment] != string(o.SHA256) {
				h.t.Fatalf("listed %+v, want %v", o, held)
			}
		}
		if after = p.Next; after == "" {
			break
		}
	}
	told := func(k [16]byte) (o Operation) { // an upload of the same bytes again tells nobody anything
		for _, s := range scopes {
			if x, ok := h.model.operations[[2][16]byte{k, s}]; ok && !x.Delete && x.Version > o.Version {
				o = x
			}
		}
		return o
	}
	want := slices.SortedFunc(maps.Keys(held), func(a, b [16]byte) int {
		x, y := told(a), told(b)
		if order[0] == '-' {
			x, y = y, x
		}
		switch order[len(order)-2:] {
		case "te":
			return cmp.Or(x.CreatedAt.Compare(y.CreatedAt), cmp.Compare(x.ID, y.ID))
		case "ze":
			return cmp.Or(cmp.Compare(x.Size, y.Size), cmp.Compare(x.ID, y.ID))
		}
		return cmp.Compare(x.ID, y.ID)
	})
	var ids []string
	for _, k := range want {
		ids = append(ids, h.model.files[k].AttachmentID)
	}
	if !slices.Equal(listed, ids) {
		h.t.Fatalf("listed by %s: %v, want %v", order, listed, ids)
	}
	count, err := h.l.Attachments(h.t.Context(), ListRequest{Scopes: scopes, CountOnly: true})
	if err != nil || count.Count != int64(len(ids)) {
		h.t.Fatalf("counted %+v (%v), want %d", count, err, len(ids))
	}
}

// compareTruth compares the references with the application's documents, which the log knows only by its changes and fills.
func (h *history) compareTruth() {
	truth, got := map[[2][16]byte]bool{}, map[[2][16]byte]bool{}
	for _, d := range h.app.documents {
		for k := range d {
			truth[k] = true
		}
	}
	rows, err := h.l.pool.Query(h.t.Context(), `SELECT DISTINCT attachment, scope FROM walgate.attachment_references`)
	if err != nil {
		h.t.Fatal(err)
	}
	for rows.Next() {
		var k [2][16]byte
		if err := rows.Scan(&k[0], &k[1]); err != nil {
			h.t.Fatal(err)
		}
		got[k] = true
	}
	if err := rows.Err(); err != nil || !maps.Equal(got, truth) {
		h.t.Errorf("the references are %v, the documents' %v (%v)", got, truth, err)
	}
}
