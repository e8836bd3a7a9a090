package policies

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
)

// AttachmentSpec names where the rows of a collection name attachments: a column of ids or of arrays of ids; what a path
// reaches in a json column; or every match of a pattern in a text column or in the strings of a json column.
type AttachmentSpec struct {
	Column  string
	Path    string // JSON path such as $.photos[*].id
	Pattern string // RE2; the whole match is the id
}

// Pair is one reference of a document as one scope sees it.
type Pair struct {
	Attachment [16]byte // AttachmentKey
	Scope      ScopeKey
	Removed    bool
}

// maxAttachmentID is how many bytes an attachment's id may have.
const maxAttachmentID = 255

// idBytes are the bytes that an attachment's id may hold.
var idBytes = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") {
		t[c] = true
	}
	return t
}()

// ValidAttachmentID says whether the text may name an attachment: 1 to 255 letters, digits, dots, underscores and hyphens,
// but neither a lone dot nor two in a row, which paths would take for directories.
func ValidAttachmentID(id string) bool { return validID(id) }

func validID[T string | []byte](id T) bool {
	if len(id) == 0 || len(id) > maxAttachmentID || len(id) == 1 && id[0] == '.' {
		return false
	}
	for i := range len(id) {
		if !idBytes[id[i]] || id[i] == '.' && i > 0 && id[i-1] == '.' {
			return false
		}
	}
	return true
}

const (
	attachmentPrefix = "walgate attachment\n"
	documentPrefix   = "walgate document\n"
	hiddenPrefix     = "walgate hidden\n"
)

// AttachmentKey is the name of an attachment in the change log.
func AttachmentKey(id []byte) [16]byte {
	var room [len(attachmentPrefix) + maxAttachmentID]byte
	return shortHash(append(append(room[:0], attachmentPrefix...), id...))
}

// DocumentKey names a document among those that refer to attachments. collection is the number that the change log gave the
// collection. It is never all zero, which stands for no document.
func DocumentKey(collection int32, docID []byte) [16]byte {
	var room [256]byte
	text := binary.BigEndian.AppendUint32(append(room[:0], documentPrefix...), uint32(collection))
	key := shortHash(append(text, docID...))
	if key == [16]byte{} {
		key[15] = 1
	}
	return key
}

// SubjectScope is the scope of what a subject uploaded for all its devices and no row names.
func SubjectScope(subject string) ScopeKey {
	return hashScope(appendSized([]byte("walgate uploads\n"), []byte(subject)))
}

// DeviceScope is the scope of what a subject uploaded for one of its devices and no row names.
func DeviceScope(subject, clientID string) ScopeKey {
	return hashScope(appendSized(appendSized([]byte("walgate device uploads\n"), []byte(subject)), []byte(clientID)))
}

// HiddenScope is the scope in which rows of a scope refer to attachments while nobody may see them. No caller reads it.
func HiddenScope(of ScopeKey) ScopeKey {
	var room [len(hiddenPrefix) + len(of)]byte
	return hashScope(append(append(room[:0], hiddenPrefix...), of[:]...))
}

func shortHash(text []byte) [16]byte {
	sum := sha256.Sum256(text)
	return [16]byte(sum[:16])
}

// HasAttachments says whether rows of the collection name attachments.
func (c *Collection) HasAttachments() bool { return len(c.attachments) > 0 }

// HasAttachments says whether rows of any collection name attachments.
func (s *Set) HasAttachments() bool {
	for _, c := range s.Collections {
		if c.HasAttachments() {
			return true
		}
	}
	return false
}

// ReadableScopes returns the scopes, of all collections with attachments, that the caller may see, each once.
func (c *Caller) ReadableScopes() []ScopeKey {
	return c.attachmentScopes(func(v *view) bool { return v.mayRead })
}

// WritableScopes returns the scopes, of all collections with attachments, in which the caller may insert or update rows, each
// once, and for each the scope of its hidden rows.
func (c *Caller) WritableScopes() []ScopeKey {
	keys := c.attachmentScopes(c.mayName)
	for _, key := range keys {
		keys = append(keys, HiddenScope(key))
	}
	return keys
}

// MayUpload says whether the caller may insert or update rows that name attachments.
func (c *Caller) MayUpload() bool {
	if c == nil {
		return false
	}
	for i := range c.views {
		if v := &c.views[i]; v.collection.HasAttachments() && len(v.keys) > 0 && c.mayName(v) {
			return true
		}
	}
	return false
}

func (c *Caller) mayName(v *view) bool { return v.collection.MayWrite(c, PushUpsert) }

// attachmentScopes joins the keys of the views that are asked for: those of two collections never coincide.
func (c *Caller) attachmentScopes(asked func(*view) bool) []ScopeKey {
	if c == nil {
		return nil
	}
	var keys []ScopeKey
	for i := range c.views {
		if v := &c.views[i]; v.collection.HasAttachments() && asked(v) {
			keys = append(keys, v.keys...)
		}
	}
	return keys
}

// compareSpecs orders what says where attachments are named.
func compareSpecs(a, b AttachmentSpec) int {
	if n := strings.Compare(a.Column, b.Column); n != 0 {
		return n
	}
	if n := strings.Compare(a.Path, b.Path); n != 0 {
		return n
	}
	return strings.Compare(a.Pattern, b.Pattern)
}
