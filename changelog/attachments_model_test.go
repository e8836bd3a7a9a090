package changelog

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// modelled is the naive model of attachments: everything is kept as plain sets and looked through as a whole at each question.
type modelled struct {
	references map[modelledReference]bool
	files      map[[16]byte]modelledFile
	withheld   map[[2][16]byte]bool
	operations map[[2][16]byte]Operation
	newest     map[int32]int32
	changed    map[string]Version // document: its newest change in the log
	fills      map[int32]bool     // done
}

type modelledReference struct {
	attachment, scope, document [16]byte
	fill                        int32
}

type modelledFile struct {
	FileEvent
	state byte
	fill  int32
}

func newModel() *modelled {
	return &modelled{map[modelledReference]bool{}, map[[16]byte]modelledFile{}, map[[2][16]byte]bool{}, map[[2][16]byte]Operation{}, map[int32]int32{}, map[string]Version{}, map[int32]bool{}}
}

func (m *modelled) clone() *modelled {
	return &modelled{maps.Clone(m.references), maps.Clone(m.files), maps.Clone(m.withheld), maps.Clone(m.operations), maps.Clone(m.newest), maps.Clone(m.changed), maps.Clone(m.fills)}
}

func (m *modelled) named(attachment [16]byte, scopes [][16]byte) (any, within, outside bool) {
	for r := range m.references {
		if r.attachment == attachment && r.document != [16]byte{} {
			any = true
			if slices.Contains(scopes, r.scope) {
				within = true
			} else {
				outside = true
			}
		}
	}
	return any, within, outside
}

// due is what the scope should do about the attachment: u hold it, m keep what it has, d hold it not.
func (m *modelled) due(attachment, scope [16]byte) byte {
	for r := range m.references {
		if r.attachment == attachment && r.scope == scope && !m.withheld[[2][16]byte{attachment, scope}] && m.files[attachment].state != 0 {
			return m.files[attachment].state
		}
	}
	return 'd'
}

// holds says whether the scope should hold the attachment.
func (m *modelled) holds(attachment, scope [16]byte) bool { return m.due(attachment, scope) == 'u' }

// apply takes one piece into the model.
func (m *modelled) apply(p *Piece) {
	for _, e := range p.Entries {
		m.changed[string(e.DocID)] = e.Version
	}
	for _, r := range p.References {
		m.refer(r)
	}
	for _, e := range p.Files {
		m.file(e)
	}
	for _, s := range p.Fills {
		if s.Start {
			m.newest[s.Collection] = s.Fill
			m.fills[s.Fill] = false
		}
		if m.newest[s.Collection] != s.Fill {
			continue
		}
		for _, row := range s.Rows {
			newest := m.changed[string(row.DocID)]
			if newest < s.From {
				for _, r := range row.References {
					r.Document, r.Fill = row.Document, s.Fill
					m.refer(r)
				}
			}
		}
		if s.SweepTo > s.SweepFrom && s.Collection != 0 {
			maps.DeleteFunc(m.references, func(r modelledReference, _ bool) bool { return slices.Contains(s.Stale, r.fill) })
		}
		if s.SweepTo > s.SweepFrom && s.Collection == 0 {
			for k, f := range m.files {
				if f.fill != s.Fill {
					f.state = 'd'
					m.files[k] = f
					m.dropUnnamed(k)
				}
			}
		}
		m.fills[s.Fill] = m.fills[s.Fill] || s.Done
	}
}

func (m *modelled) refer(r Reference) {
	if r.Removed {
		maps.DeleteFunc(m.references, func(x modelledReference, _ bool) bool {
			return x.attachment == r.Attachment && x.scope == r.Scope && x.document == r.Document
		})
		return
	}
	m.references[modelledReference{r.Attachment, r.Scope, r.Document, r.Fill}] = true
}

func (m *modelled) dropUnnamed(attachment [16]byte) {
	maps.DeleteFunc(m.references, func(r modelledReference, _ bool) bool {
		return r.attachment == attachment && r.document == [16]byte{}
	})
}

func (m *modelled) file(e FileEvent) {
	old, was := m.files[e.Key]
	fill := m.newest[0]
	if was && old.fill == fill && old.ID >= e.ID {
		return
	}
	f := modelledFile{e, e.state(), fill}
	if e.state() != 'u' && was {
		f.SHA256, f.Home = old.SHA256, old.Home
	}
	m.files[e.Key] = f
	if was && old.ID == e.ID {
		return
	}
	if was && e.state() == 'm' {
		return
	}
	m.dropUnnamed(e.Key)
	if e.state() == 'd' {
		return
	}
	named, _, _ := m.named(e.Key, nil)
	if !named {
		m.references[modelledReference{e.Key, e.Home, [16]byte{}, -1}] = true
	}
	if was && e.Event == 'r' || e.state() == 'm' {
		return
	}
	maps.DeleteFunc(m.withheld, func(k [2][16]byte, _ bool) bool { return k[0] == e.Key })
	for r := range m.references {
		if e.Scopes != nil && r.attachment == e.Key && r.document != [16]byte{} && !slices.Contains(e.Scopes, r.scope) {
			m.withheld[[2][16]byte{e.Key, r.scope}] = true
		}
	}
}

// commit ends a log transaction: it returns what the log should say now, given which versions named each attachment.
func (m *modelled) commit(got []Operation, versions map[[16]byte][]Version, universe [][2][16]byte) error {
	for key := range m.files {
		if named, _, _ := m.named(key, nil); named {
			m.dropUnnamed(key)
		}
	}
	told := map[[2][16]byte]Operation{}
	var last Version
	for _, o := range got {
		k := [2][16]byte{o.Attachment, o.Scope}
		if _, twice := told[k]; twice || o.Version < last {
			return fmt.Errorf("told twice or out of order: %+v", o)
		}
		last, told[k] = o.Version, o
	}
	for _, k := range universe {
		f, known := m.files[k[0]]
		old, had := m.operations[k]
		was, due := byte('d'), byte('d')
		if had {
			was = opOf(old)
		}
		if known {
			due = m.due(k[0], k[1])
		}
		wanted := due != was || due != 'd' && !bytes.Equal(old.SHA256, f.SHA256)
		o, is := told[k]
		delete(told, k)
		if is != wanted || is && opOf(o) != due {
			return fmt.Errorf("attachment %x in scope %x: want %c %v, told %v %+v (was %c)", k[0][15], k[1][15], due, wanted, is, o, was)
		}
		if is && (!slices.Contains(versions[k[0]], o.Version) || !bytes.Equal(o.SHA256, f.SHA256) || o.ID != f.AttachmentID) {
			return fmt.Errorf("attachment %x in scope %x: told %+v, want one of the versions %v and %x", k[0][15], k[1][15], o, versions[k[0]], f.SHA256)
		}
		if is {
			m.operations[k] = o
		}
	}
	if len(told) > 0 {
		return fmt.Errorf("told of nothing: %+v", told)
	}
	return nil
}

// lost says whether a caller of the scopes keeps an attachment whose bytes the store lost.
func (m *modelled) lost(attachment [16]byte, scopes [][16]byte) bool {
	return slices.ContainsFunc(scopes, func(s [16]byte) bool { return m.due(attachment, s) == 'm' })
}

// held is what a caller of the scopes should have: attachment to digest.
func (m *modelled) held(scopes [][16]byte) map[[16]byte]string {
	out := map[[16]byte]string{}
	for k, f := range m.files {
		for _, s := range scopes {
			if m.holds(k, s) {
				out[k] = string(f.SHA256)
			}
		}
	}
	return out
}

func opOf(o Operation) byte {
	switch {
	case o.Delete:
		return 'd'
	case o.Missing:
		return 'm'
	}
	return 'u'
}

func pick[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }
