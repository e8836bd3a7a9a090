package policies

import (
	"bytes"
	"regexp"
	"slices"

	"github.com/walgate/walgate/schema"
)

// attachment is one place of a collection's rows that names attachments.
type attachment struct {
	spec    AttachmentSpec // with its path in canonical form
	table   int            // position in Table.Columns
	typ     *schema.Type   // underlying
	path    jsonPath       // nil: the column itself, or the pattern
	pattern *regexp.Regexp
}

// references finds the attachments that a bound layout's rows name.
type references struct {
	at             []int // positions in rows, one an attachment of the collection
	old            idSet
	new            idSet
	texts, scratch []byte // of arrays and of strings
	oldHidden      []ScopeKey
	newHidden      []ScopeKey
}

// idSet is what one row names: keys, each once and in order, once sorted.
type idSet struct {
	keys [][16]byte
	ids  *[]string // takes the ids themselves where somebody asks for them
}

func (s *idSet) add(id []byte) {
	if !validID(id) {
		return
	}
	if s.ids != nil {
		*s.ids = append(*s.ids, string(id))
		return
	}
	s.keys = append(s.keys, AttachmentKey(id))
}

func (s *idSet) sort() {
	if len(s.keys) > 1 {
		slices.SortFunc(s.keys, compareKeys)
		s.keys = slices.Compact(s.keys)
	}
}

func compareKeys(a, b [16]byte) int { return bytes.Compare(a[:], b[:]) }

// AppendReferences appends the pairs that the change takes away and then those that it adds. It is called right after Route
// with the same rows, as it takes the scopes from there; with old nil after a Route that had one, every pair of new is added.
// A row that nobody may see has its pairs in hidden scopes: it may come to sight again, and needs its files then. With whole,
// every pair that either side may have left is taken away first, and all of new are added: for readers that don't know what
// they hold of this document.
func (b *Binding) AppendReferences(dst []Pair, old, new schema.Row, whole bool) (out []Pair) {
	c := b.Collection
	if len(c.attachments) == 0 {
		return dst
	}
	r := &b.references
	oldKeys, newKeys := b.referenceScopes(b.oldKeys, &r.oldHidden, old), b.referenceScopes(b.newKeys, &r.newHidden, new)
	unchanged := len(oldKeys) > 0 && len(newKeys) > 0 && same(r.at, old, new)
	if unchanged && !whole && slices.Equal(oldKeys, newKeys) {
		return dst
	}
	r.old.keys, r.new.keys = r.old.keys[:0], r.new.keys[:0]
	if len(newKeys) > 0 {
		b.collect(&r.new, new)
		r.new.sort()
	}
	was := r.new.keys
	if !unchanged {
		if len(oldKeys) > 0 {
			b.collect(&r.old, old)
			r.old.sort()
		}
		was = r.old.keys
	}
	now := r.new.keys
	if !whole {
		dst = appendMissing(dst, was, oldKeys, now, newKeys, true)
		return appendMissing(dst, now, newKeys, was, oldKeys, false)
	}
	dst = appendMissing(dst, was, oldKeys, nil, nil, true)
	dst = appendMissing(dst, now, newKeys, was, oldKeys, true)
	return appendMissing(dst, now, newKeys, nil, nil, false)
}

// referenceScopes returns the scopes in which a row refers: those where it is visible or, where there are none, hidden ones.
func (b *Binding) referenceScopes(visible []ScopeKey, hidden *[]ScopeKey, row schema.Row) []ScopeKey {
	switch {
	case len(row) != len(b.columns):
		return nil
	case len(visible) > 0:
		return visible
	}
	keys := b.appendKeys((*hidden)[:0], row)
	for i := range keys {
		keys[i] = HiddenScope(keys[i])
	}
	if len(keys) == 0 {
		keys = append(keys, HiddenScope(b.Collection.everyone))
	}
	*hidden = keys
	return keys
}

// appendMissing appends every pair of an attachment and a scope that is not among the others. Both lists of attachments are
// sorted.
func appendMissing(dst []Pair, attachments [][16]byte, scopes []ScopeKey, others [][16]byte, otherScopes []ScopeKey, removed bool) []Pair {
	for _, key := range attachments {
		for len(others) > 0 && compareKeys(others[0], key) < 0 {
			others = others[1:]
		}
		shared := len(others) > 0 && others[0] == key
		for _, scope := range scopes {
			if !shared || !slices.Contains(otherScopes, scope) {
				dst = append(dst, Pair{Attachment: key, Scope: scope, Removed: removed})
			}
		}
	}
	return dst
}

// ReferencedIDs returns the ids that the row names, whoever may see it, sorted and each once.
func (b *Binding) ReferencedIDs(row schema.Row) []string {
	if len(row) != len(b.columns) {
		return nil
	}
	var ids []string
	b.collect(&idSet{ids: &ids}, row)
	slices.Sort(ids)
	return slices.Compact(ids)
}

// collect adds what the row names to the set.
func (b *Binding) collect(into *idSet, row schema.Row) {
	for i := range b.Collection.attachments {
		a := &b.Collection.attachments[i]
		text := row[b.references.at[i]]
		if text == nil {
			continue
		}
		switch {
		case a.typ.Kind == schema.KindJSON:
			b.collectJSON(into, a, text)
		case a.pattern != nil:
			collectMatches(into, a.pattern, text)
		case a.typ.Kind == schema.KindArray:
			// An array as the codec writes it in documents is what the path $ looks through.
			var err error
			if b.references.texts, err = schema.AppendValue(b.references.texts[:0], a.typ, text, false); err == nil {
				b.collectJSON(into, a, b.references.texts)
			}
		default:
			into.add(text)
		}
	}
}

// collectMatches adds every match of the pattern that is an id.
func collectMatches(into *idSet, pattern *regexp.Regexp, text []byte) {
	for _, at := range pattern.FindAllIndex(text, -1) {
		into.add(text[at[0]:at[1]])
	}
}
