package changelog

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
)

// application is what the source holds: each document's references, with the versions at which they were so.
type application struct {
	r         *rand.Rand
	documents map[int]map[[2][16]byte]bool
	files     map[[16]byte]FileEvent
	event     int64
	clock     *Clock
	lsn       LSN
	fill      int32 // of the collection
	filled    bool
	fillAt    int // the next document that it looks at
	bytesFill int32
	next      int32
}

func (a *application) clone() *application {
	c := *a
	c.documents, c.files = maps.Clone(a.documents), maps.Clone(a.files) // their values aren't changed
	return &c
}

func (a *application) version() Version { return a.clock.Next(0) }

func (a *application) change(p *Piece) {
	doc, v := a.r.IntN(randomDocuments), a.version()
	old, now := a.documents[doc], map[[2][16]byte]bool{}
	for range a.r.IntN(4) {
		now[[2][16]byte{attachment(a.r.IntN(randomAttachments)), scope(byte(a.r.IntN(randomScopes)))}] = true
	}
	if a.r.IntN(4) == 0 { // moved from another document
		other := a.r.IntN(randomDocuments)
		if other != doc {
			now = maps.Clone(a.documents[other])
			a.write(p, other, v, a.documents[other], nil)
			v = a.version()
		}
	}
	a.write(p, doc, v, old, now)
}

func (a *application) write(p *Piece, doc int, v Version, old, now map[[2][16]byte]bool) {
	if p.Tx == 0 {
		p.Tx, p.Xid = v, uint64(v)
	}
	add := func(k [2][16]byte, removed bool) {
		p.References = append(p.References, Reference{Attachment: k[0], Scope: k[1], Document: documentKey(doc), Version: v, Fill: a.fill, Removed: removed})
	}
	for k := range old {
		if !now[k] || !a.filled {
			add(k, true)
		}
	}
	for k := range now {
		if !old[k] && !a.filled {
			add(k, true)
		}
	}
	for k := range now {
		if !old[k] || !a.filled {
			add(k, false)
		}
	}
	a.documents[doc] = now
	p.Entries = append(p.Entries, upsert(v, p.Tx, 200, strconv.Itoa(doc)))
	p.Version = v
}

func (a *application) upload(p *Piece) {
	v, n := a.version(), a.r.IntN(randomAttachments)
	a.event++
	e := FileEvent{ID: a.event, AttachmentID: fmt.Sprint("photo", n), Key: attachment(n), Event: "uuuudmr"[a.r.IntN(7)], ContentType: "image/png",
		SHA256: []byte{byte(a.r.IntN(3))}, Home: scope(byte(randomScopes + a.r.IntN(randomHomes))), CreatedAt: v.Time(), Version: v}
	e.Size = int64(e.SHA256[0])
	if a.r.IntN(2) == 0 {
		e.Scopes = [][16]byte{}
		for s := range randomScopes {
			if a.r.IntN(2) == 0 {
				e.Scopes = append(e.Scopes, scope(byte(s)))
			}
		}
	}
	if old, ok := a.files[e.Key]; ok && e.Event != 'u' {
		e.SHA256, e.Home = old.SHA256, old.Home
	}
	if p.Tx == 0 {
		p.Tx, p.Xid = v, uint64(v)
	}
	p.Files = append(p.Files, e)
	p.Version = v
	e.Scopes, e.Event = nil, e.state() // what the source keeps
	a.files[e.Key] = e
}

// refill begins a new fill, after a truncation perhaps.
func (a *application) refill(p *Piece) {
	if a.r.IntN(2) == 0 {
		for d := range a.documents {
			a.documents[d] = nil
		}
	}
	v := a.version()
	a.next++
	a.fill, a.filled, a.fillAt = a.next, false, 0
	p.Version = v
	p.Raises = append(p.Raises, Raise{Collection: 1, Version: v, Reason: "test"})
	p.Fills = append(p.Fills, FillStep{Fill: a.fill, Collection: 1, Version: v, Start: true})
}

// rows are the documents from a place on, as a snapshot shows them.
func (a *application) rows(n int) ([]FillRow, int) {
	var out []FillRow
	at := a.fillAt
	for ; at < randomDocuments && n > 0; at, n = at+1, n-1 {
		row := FillRow{DocID: []byte(strconv.Itoa(at)), Document: documentKey(at)}
		for k := range a.documents[at] {
			row.References = append(row.References, Reference{Attachment: k[0], Scope: k[1]})
		}
		out = append(out, row)
	}
	return out, at
}
