package policies

import (
	"slices"

	"github.com/walgate/walgate/schema"
)

// AddedIDs returns the ids, sorted and each once, that a change makes the row name anew, or in a scope where it did not
// name them, or in sight where it was hidden. before is nil for an insert. Only the columns written count: what triggers
// add is their application's own business.
func (b *Binding) AddedIDs(before, after schema.Row, written []string) ([]string, error) {
	if !b.Collection.HasAttachments() || after == nil {
		return nil, nil
	}
	if _, err := b.Route(nil, before, after); err != nil {
		return nil, err
	}
	judged := slices.Clone(after)
	for _, at := range b.references.at {
		if slices.Contains(written, b.columns[at].Name) {
			continue
		}
		judged[at] = nil
		if before != nil {
			judged[at] = before[at]
		}
	}
	ids := b.ReferencedIDs(judged)
	if before == nil || len(ids) == 0 || len(b.newKeys) > 0 && len(b.oldKeys) == 0 {
		return ids, nil
	}
	scopes := b.appendKeys(nil, before)
	for _, key := range b.appendKeys(nil, after) {
		if !slices.Contains(scopes, key) {
			return ids, nil
		}
	}
	known := b.ReferencedIDs(before)
	return slices.DeleteFunc(ids, func(id string) bool { _, found := slices.BinarySearch(known, id); return found }), nil
}
